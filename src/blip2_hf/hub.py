"""Sharing on the Hub: the code that a model needs where this package is not installed, the card, one commit."""

import importlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.pipelines.base import Pipeline
from transformers.processing_utils import ProcessorMixin

from .model_card import CARD_NAME, check_facts, is_ours, write_model_card


# Of each model: what it is to the Auto classes, by module, as _registration.py tells them
_AUTO_CLASSES = {
    "Blip2HfForConditionalGeneration": {
        "AutoModelForImageTextToText": "modeling_blip2.Blip2HfForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_blip2.Blip2HfForConditionalGeneration",
        "AutoModelForVisualQuestionAnswering": "modeling_blip2.Blip2HfForConditionalGeneration",
    },
    "Blip2HfForPreTraining": {
        "AutoModelForPreTraining": "modeling_pretraining.Blip2HfForPreTraining",
        "AutoModelForZeroShotImageClassification": "modeling_retrieval.Blip2HfForImageTextRetrieval",
    },
    "Blip2HfForImageTextRetrieval": {
        "AutoModelForZeroShotImageClassification": "modeling_retrieval.Blip2HfForImageTextRetrieval",
    },
    "Blip2HfModel": {},
}
_AUTO_CLASSES_OF_ALL = {
    "AutoConfig": "configuration_blip2.Blip2HfConfig",
    "AutoModel": "modeling_base.Blip2HfModel",
}
_PROCESSOR = "processing_blip2.Blip2HfProcessor"
# Of each Auto class: the pipelines of its models, and the Auto classes that these load with
_PIPELINES = {
    "AutoModelForImageTextToText": {
        "image-to-text": ("pipeline_blip2.ImageToTextPipeline", ["AutoModelForImageTextToText"]),
        "visual-question-answering": (
            "pipeline_blip2.VisualQuestionAnsweringPipeline",
            ["AutoModelForVisualQuestionAnswering", "AutoModelForImageTextToText"],
        ),
    },
    "AutoModelForZeroShotImageClassification": {
        "zero-shot-image-classification": (
            "pipeline_zero_shot.ZeroShotImageClassificationPipeline",
            ["AutoModelForZeroShotImageClassification"],
        ),
    },
}

# Weights at the top of a repository, whole or in shards, of which from_pretrained takes the first kind that it finds
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def write_code(folder: str | os.PathLike, shared: Any):
    r"""
    Completes a folder that `save_pretrained` has written, so that `AutoModel...`, `AutoProcessor` and `pipeline` load
    it with `trust_remote_code=True` where this package is not installed: puts the source files next to the weights,
    and `auto_map` and `custom_pipelines` into config.json and processor_config.json.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        shared ([`Blip2PreTrainedModel`], [`Blip2Processor`] or one of the pipelines):
            What was saved there.

    Raises:
        ValueError: if the model's class is not one of this package.
    """
    folder = Path(folder)
    model, processor = _parts(shared)
    if model is shared and not is_of_this_package(model):
        raise ValueError(
            f"{_class_name(model)} is none of {', '.join(_AUTO_CLASSES)}, whose code this package can put next to the "
            "weights. For a class of your own, call its register_for_auto_class, and save without with_code or push "
            "with transformers.PreTrainedModel.push_to_hub(model, repo_id)."
        )
    references: list[str] = []
    if type(processor).__name__ == "Blip2HfProcessor":
        _add_to_json(folder / "processor_config.json", {"auto_map": {"AutoProcessor": _PROCESSOR}})
        references.append(_PROCESSOR)
    if model is not None:
        auto_map, pipelines = _auto_map(model), _pipelines(shared, model)
        fields = {"auto_map": auto_map, "custom_pipelines": pipelines}
        _add_to_json(folder / "config.json", {name: value for name, value in fields.items() if value})
        references += [*auto_map.values(), *(pipeline["impl"] for pipeline in pipelines.values())]
    for source in _source_files(references):
        _copy(source, folder / source.name)


def write_code_and_card(folder: str | os.PathLike, shared: Any):
    """What `save_pretrained(folder, with_code=True)` adds: [`write_code`], and a card if there is none."""
    write_code(folder, shared)
    model, _ = _parts(shared)
    if is_of_this_package(model):
        write_model_card(folder, model)


def _parts(shared: Any) -> tuple[Any, Any]:
    """`(model, processor)`: of a pipeline both, otherwise the one that it is."""
    if isinstance(shared, Pipeline):
        return shared.model, shared.processor
    return (None, shared) if isinstance(shared, ProcessorMixin) else (shared, None)


def is_of_this_package(model: Any) -> bool:
    """Whether the model's class is one of this package, and not derived from one."""
    return _class_name(model) in _AUTO_CLASSES


def _class_name(model: Any) -> str:
    # FSDP's `fully_shard` puts its own in front
    return type(model).__name__.removeprefix("FSDP")


def _auto_map(model: Any) -> dict[str, str]:
    # The pipelines take models of other libraries too, whose code is not ours to share
    return {**_AUTO_CLASSES_OF_ALL, **_AUTO_CLASSES[_class_name(model)]} if is_of_this_package(model) else {}


def _pipelines(shared: Any, model: Any) -> dict[str, dict[str, Any]]:
    """The entry `custom_pipelines` of config.json."""
    tasks = {task: entry for name in _auto_map(model) for task, entry in _PIPELINES.get(name, {}).items()}
    if not is_of_this_package(model):
        name = type(shared).__name__
        entries = [entry for table in _PIPELINES.values() for entry in table.items()]
        tasks = {task: entry for task, entry in entries if entry[0].endswith(f".{name}")}
    return {
        task: {"impl": reference, "pt": auto_classes, "type": "multimodal"}
        for task, (reference, auto_classes) in tasks.items()
    }


def _source_files(references: list[str]) -> list[Path]:
    """The files of the modules of `module.Class` references, and all that these import from this package."""
    files = set()
    for module in {reference.partition(".")[0] for reference in references}:
        path = importlib.import_module(f"blip2_hf.{module}").__file__
        files |= {Path(path), *map(Path, get_relative_import_files(path))}
    return sorted(files)


def _copy(source: Path, target: Path):
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _add_to_json(path: Path, fields: dict[str, Any]):
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
    Pushes a model, a processor or a pipeline with its code and, but for a processor, a card. All files go into one
    commit: what breaks off leaves the repository as it was, and what has not changed is not sent again. Weights in
    other files than those of the new model, and code that it does not need, are deleted from the repository.

    Args:
        shared ([`Blip2PreTrainedModel`], [`Blip2Processor`] or one of the pipelines):
            What is pushed.
        repo_id (`str`):
            Name of the repository, which is made if there is none.
        commit_message (`str`, *optional*), commit_description (`str`, *optional*):
            Those of the commit.
        private (`bool`, *optional*):
            Whether a repository that is made is private. The account's own default if it is not given.
        token (`str` or `bool`, *optional*):
            The token. That of `hf auth login` if it is not given.
        revision (`str`, *optional*):
            The branch, which is made if there is none; `main` if it is not given.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request in place of a commit.
        max_shard_size (`int` or `str`, *optional*):
            Largest size of a file of weights.
        saved (`dict[str, Path]`, *optional*):
            Files that `save_pretrained` has written, by their names in the repository. If it is not given, they are
            written now.
        facts:
            What the card is to say: see [`~model_card.write_model_card`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, or the last one where nothing has changed.

    Raises:
        TypeError: if the card has no place for one of `facts`.
        ValueError: if `results` are not what was expected.
    """
    api = HfApi(token=token)
    model, _ = _parts(shared)
    if not is_of_this_package(model) and facts:
        raise TypeError(f"{', '.join(sorted(facts))}: there is a card with a BLIP-2 model of this package alone.")
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
    Pushes what `save_pretrained` has just written into a folder, whatever else is there.

    Args:
        shared ([`Blip2PreTrainedModel`], [`Blip2Processor`] or one of the pipelines):
            What was saved.
        folder (`str` or `os.PathLike`):
            The folder.
        before (`dict[str, tuple[int, int]]`):
            What [`file_states`] said of it before.
        repo_id (`str`, *optional*):
            Name of the repository; that of the folder if it is not given.
        options:
            Those of [`push`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit.
    """
    states = file_states(folder)
    saved = {name: Path(folder) / name for name, state in states.items() if before.get(name) != state}
    # A processor has no options that change what is saved, and files in folders that were written before
    saved_now = None if _parts(shared)[0] is None else saved
    return push(shared, repo_id or Path(folder).resolve().name, saved=saved_now, **options)


def file_states(folder: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """Of each file in a folder, by name: what changes when it is written again."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def fetch_card(
    folder: str | os.PathLike, repo_id: str, *, revision: str | None = None, token: str | bool | None = None
):
    r"""
    Puts the card of a repository into a folder. One that is there gives way only if this library wrote it and
    the repository's is yours.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        repo_id (`str`):
            Name of the repository.
        revision (`str`, *optional*):
            Its branch; `main` if it is not given.
        token (`str` or `bool`, *optional*):
            The token. That of `hf auth login` if it is not given.

    Raises:
        OSError: if the repository can't be read.
    """
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, CARD_NAME, revision=revision, force_download=True)
    except LocalEntryNotFoundError:
        # There may be a card: the Hub has not answered
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
    """Of the files of a repository: other weights than those of the new model, and code that nothing there needs."""
    needed = {addition.path_in_repo for addition in additions}
    if "processor_config.json" in there:
        needed |= {path.name for path in _source_files([_PROCESSOR])}
    tables = [_AUTO_CLASSES_OF_ALL, *_AUTO_CLASSES.values()]
    classes = [reference for table in tables for reference in table.values()]
    pipelines = [reference for table in _PIPELINES.values() for reference, _ in table.values()]
    code = {path.name for path in _source_files([_PROCESSOR, *classes, *pipelines])}
    stale = [name for name in there if name not in needed and (name in code or _WEIGHTS.fullmatch(name))]
    return [CommitOperationDelete(name) for name in stale]


__all__ = [
    "fetch_card",
    "file_states",
    "is_of_this_package",
    "push",
    "push_saved",
    "write_code",
    "write_code_and_card",
]
