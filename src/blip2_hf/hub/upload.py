"""Pushing to the Hub: a model with its code and its card, in one commit."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .model_card import CARD_NAME, check_facts, is_ours, write_model_card
from .remote_code import PROCESSOR, all_source_names, is_of_this_package, parts_of, source_files, write_code


# Weights at the top of a repository, in one file or in shards: from_pretrained takes the first kind that it finds
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# Files that former versions of this package put next to a model
_FORMER_SOURCES = {
    "cache_name.py",
    "image_states.py",
    "label_scores.py",
    "loss_by_rows.py",
    "parts.py",
    "sharing.py",
}


def push(
    shared: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    saved: dict[str, Path] | None = None,
    **facts,
) -> CommitInfo:
    r"""
    Push a model, a processor or a pipeline with its code and, except for a processor, a card. All files go into one
    commit: a push that breaks off leaves the repository as it was, and unchanged files are not sent again. Weights in
    other files than those of the new model, and code that it does not need, are deleted from the repository.

    Args:
        shared ([`Blip2PreTrainedModel`], [`Blip2Processor`] or one of the pipelines):
            The object to push.
        repo_id (`str`):
            Name of the repository, which is created if it does not exist.
        commit_message (`str`, *optional*), commit_description (`str`, *optional*):
            Message and description of the commit.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to the account's own setting.
        token (`str` or `bool`, *optional*):
            The token. Defaults to that of `hf auth login`.
        revision (`str`, *optional*):
            The branch, which is created if it does not exist. Defaults to `main`.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of committing to the branch.
        max_shard_size (`int` or `str`, *optional*):
            Largest size of a file of weights.
        saved (`dict[str, Path]`, *optional*):
            Files that `save_pretrained` has written, by their names in the repository. By default they are written
            now.
        facts:
            Facts for the card (see [`~model_card.write_model_card`]).

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, or the last one if nothing has changed.

    Raises:
        TypeError: if the card has no place for one of `facts`.
        ValueError: if `results` lack `task` or `scores`.
    """
    api = HfApi(token=token)
    model, _ = parts_of(shared)
    if not is_of_this_package(model) and facts:
        raise TypeError(f"{', '.join(sorted(facts))}: only a BLIP-2 model of this package has a card. Leave them out.")
    check_facts(facts)
    with tempfile.TemporaryDirectory() as folder:
        if saved is None:
            shared.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        for name, path in (saved or {}).items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, Path(folder) / name)
        write_code(folder, shared)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if is_of_this_package(model):
            fetch_card(folder, repo_id, revision=revision, token=token)
            write_model_card(folder, model, repo_id=repo_id, **facts)
        additions = _additions(Path(folder))
        stale = [] if model is None else _stale_files(api.list_repo_files(repo_id, revision=revision), additions)
        # Not upload_folder, which may make several commits
        return api.create_commit(
            repo_id,
            [*additions, *stale],
            commit_message=commit_message or f"Upload {type(shared).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def push_saved(
    shared: Any, folder: str | os.PathLike, before: dict[str, tuple[int, int]], repo_id: str | None, **options
) -> CommitInfo:
    r"""
    Push the files that `save_pretrained` has just written into a folder, and no others in it.

    Args:
        shared ([`Blip2PreTrainedModel`], [`Blip2Processor`] or one of the pipelines):
            The object that was saved.
        folder (`str` or `os.PathLike`):
            The folder.
        before (`dict[str, tuple[int, int]]`):
            The [`file_states`] of the folder before.
        repo_id (`str`, *optional*):
            Name of the repository. Defaults to that of the folder.
        options:
            Arguments of [`push`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit.
    """
    states = file_states(folder)
    saved = {name: Path(folder) / name for name, state in states.items() if before.get(name) != state}
    # A processor is saved again, because it wrote a subfolder before `before` was read
    saved_now = None if parts_of(shared)[0] is None else saved
    return push(shared, repo_id or Path(folder).resolve().name, saved=saved_now, **options)


def file_states(folder: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """Return, for each file in a folder, numbers that change when it is written again."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def fetch_card(
    folder: str | os.PathLike, repo_id: str, *, revision: str | None = None, token: str | bool | None = None
):
    r"""
    Put the card of a repository into a folder. A card in the folder is replaced only if this library wrote it and the
    repository's card is yours.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        repo_id (`str`):
            Name of the repository.
        revision (`str`, *optional*):
            Its branch. Defaults to `main`.
        token (`str` or `bool`, *optional*):
            The token. Defaults to that of `hf auth login`.

    Raises:
        OSError: if the repository can't be read.
    """
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, CARD_NAME, revision=revision, force_download=True)
    except LocalEntryNotFoundError:
        # The Hub has not answered, and may have a card
        raise
    except EntryNotFoundError:
        return
    here = Path(folder) / CARD_NAME
    if not here.exists() or (is_ours(here.read_bytes().decode()) and not is_ours(Path(path).read_bytes().decode())):
        shutil.copyfile(path, here)


def _additions(folder: Path) -> list[CommitOperationAdd]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]


def _stale_files(there: list[str], additions: list[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """Return deletions of weights that are not of the new model, and of code that nothing in the repository needs."""
    needed = {addition.path_in_repo for addition in additions}
    if "processor_config.json" in there:
        needed |= {path.name for path in source_files([PROCESSOR])}
    code = all_source_names() | _FORMER_SOURCES
    stale = [name for name in there if name not in needed and (name in code or _WEIGHTS.fullmatch(name))]
    return [CommitOperationDelete(name) for name in stale]


__all__ = ["fetch_card", "file_states", "push", "push_saved"]
