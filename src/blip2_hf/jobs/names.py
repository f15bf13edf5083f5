"""Names of models and data that users give. One that leads nowhere is refused at once, with a guess."""

import difflib
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import SIMILAR, first_sentence


# In the folder of a model, or of adapters of PEFT
_CONFIGS = ("config.json", "adapter_config.json")
_FILE_ENDINGS = re.compile(
    r"\.(pth?|bin|ckpt|safetensors|gguf|onnx|json[l5]?|ndjson|csv|tsv|txt|token|gz|parquet|pq|arrow|tar|zip|jpe?g|png|webp|gif|hei[cf])$",
    re.I,
)
_TIMEOUT = 5  # seconds for the one request to the Hub


def check_model_name(name: str | os.PathLike):
    r"""
    Refuse the name of a model that is neither a folder of one nor a repository on the Hub that can be read. The Hub is
    asked once, without retries, if the name can be a repository's that is not in the cache.

    Args:
        name (`str` or `os.PathLike`):
            Folder of a model or of adapters, or id on the Hub.

    Raises:
        FileNotFoundError: if there is nothing of this name, or the folder holds no model.
        PermissionError: if the repository is gated.
        ConnectionError: if the Hub does not answer.
        ValueError: if it is a file, or holds adapters of a model that is not there.
    """
    path = Path(name)
    if not str(name):
        raise ValueError("An empty name was given: the folder of a model, or an id on the Hub, was expected.")
    if path.is_dir():
        _check_model_folder(path)
    elif path.exists():
        raise ValueError(f"{name} is a file: the folder of a model, or an id on the Hub, was expected.{_beside(path)}")
    elif not _may_be_hub_id(str(name)):
        kind = "file" if _FILE_ENDINGS.search(str(name)) else "folder"
        raise FileNotFoundError(f"There is no {kind} {name}.{_similar(path, of_folders=kind == 'folder')}")
    else:
        _check_repository(str(name), "model", "config.json")


def check_data_name(name: str | os.PathLike):
    r"""
    Refuse the name of data that is neither a file or folder nor a dataset on the Hub that can be read. The Hub is
    asked once, without retries, if the name can be a dataset's that is not in the cache.

    Args:
        name (`str` or `os.PathLike`):
            File, files (`*`), folder, URL, or id on the Hub, which may end in `:split` or `:configuration:split`.

    Raises:
        FileNotFoundError: if there is nothing of this name, or the folder is empty.
        PermissionError: if the dataset is gated.
        ConnectionError: if the Hub does not answer.
    """
    name = str(name)
    if not name:
        raise ValueError("An empty name was given: a file, a folder, or a dataset's id on the Hub, was expected.")
    # A split may stand behind the name; the colon of a protocol has slashes after it
    path = Path(name) if os.path.exists(name) else Path(re.split(r":(?!//)", name, maxsplit=1)[0])
    if "://" in name:
        return
    if is_dataset_id(str(path)):
        _check_repository(str(path), "dataset", "README.md")
    elif path.is_dir() and not any(path.iterdir()):
        raise FileNotFoundError(f"The folder {path} is empty.")


def check_names(models: Iterable[str | os.PathLike | None], data: Iterable[str | os.PathLike | None] = ()):
    r"""
    Refuse names of models and of data that lead nowhere, before anything is loaded.

    Args:
        models, data (`Iterable` of `str` or `os.PathLike`):
            Names, as in [`check_model_name`] and [`check_data_name`]. `None` is passed over.

    Raises:
        OSError or ValueError: as these.
    """
    for check, names in ((check_data_name, data), (check_model_name, models)):
        for name in names:
            if name is not None:
                check(name)


def check_folder(name: str | os.PathLike):
    """Refuse a name that is not that of a folder here, by a `FileNotFoundError` or a `NotADirectoryError`."""
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"There is no folder {name}.{_similar(path, of_folders=True)}")
    if not path.is_dir():
        raise NotADirectoryError(f"{name} is a file: a folder was expected.")


def check_file(name: str | os.PathLike):
    """Refuse a name that is not that of a file here, by a `FileNotFoundError` or an `IsADirectoryError`."""
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {name}.{_similar(path)}")
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a folder: a file was expected.")


def is_dataset_id(name: str) -> bool:
    r"""
    Tell whether a name may be that of a dataset on the Hub, without asking the Hub. Refuse a path that leads nowhere.

    Args:
        name (`str`):
            Path, in which `*` may stand for any characters, or id on the Hub.

    Returns:
        `bool`: `False` for a path of something that is there.

    Raises:
        FileNotFoundError: if it is neither.
    """
    path = Path(name)
    if path.exists():
        return False
    if glob.has_magic(name):
        if not any(glob.iglob(name, recursive=True)):
            raise FileNotFoundError(f"no file is called {name}.")
        return False
    owner, slash, _ = name.partition("/")
    if not slash or os.path.isdir(owner) or not _may_be_hub_id(name):
        kind = "file" if _FILE_ENDINGS.search(name) else "file or folder"
        raise FileNotFoundError(f"There is no {kind} {name}.{_similar(path)}")
    return True


def _check_model_folder(path: Path):
    if not any((path / config).is_file() for config in _CONFIGS):
        inside = [file for config in _CONFIGS for file in path.glob(f"*/{config}")]
        newest = max(inside, key=os.path.getmtime, default=None)
        guess = "" if newest is None else f" Did you mean {newest.parent}?"
        raise FileNotFoundError(f"The folder {path} holds no model, because it has no config.json.{guess}")
    if (path / "config.json").is_file():
        return
    from .inference import adapter_base

    base = adapter_base(path)
    if base is not None:
        try:
            check_model_name(base)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} holds adapters of {base}, which can't be loaded. {error} If the model has moved, change "
                "base_model_name_or_path in adapter_config.json."
            ) from error


def _beside(path: Path) -> str:
    """Return the end of a message about a file that was given in place of a folder."""
    if any((path.parent / config).is_file() for config in _CONFIGS):
        return f" Did you mean {path.parent}?"
    return " blip2-hf convert reads files of LAVIS." if path.suffix in (".pth", ".pt") else ""


def _may_be_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not _FILE_ENDINGS.search(name)


def _similar(path: Path, of_folders: bool = False) -> str:
    """
    Return the end of a message: the path with what is most similar in place of its first part that is missing.
    `of_folders` leaves out files.
    """
    parts = path.parts or (".",)
    missing = next(number for number in range(len(parts)) if not Path(*parts[: number + 1]).exists())
    folder, rest = Path(*parts[:missing]), parts[missing + 1 :]
    try:
        names = [entry.name for entry in os.scandir(folder) if not of_folders or entry.is_dir()]
        similar = difflib.get_close_matches(parts[missing], names, cutoff=SIMILAR)
    except OSError:
        similar = []
    found = [str(folder / name) for name in similar]
    # With all of the rest, if that is there
    whole = [str(Path(name, *rest)) for name in found if Path(name, *rest).exists()]
    return f" Did you mean {(whole or found)[0]}?" if found else ""


def _check_repository(name: str, kind: str, file: str):
    """Refuse a name that is no repository on the Hub that can be read. `file` is one that most have."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    if _is_cached(name, kind):
        return
    nothing = f"There is no folder {name} here"
    guess = _similar(Path(name), of_folders=kind == "model")
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            f"{nothing}, and no such {kind} in the Hub's cache, which alone is read with HF_HUB_OFFLINE.{guess}"
        )
    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=_TIMEOUT)
    except errors.EntryNotFoundError:
        return
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: ask for access on its page on the Hub, then log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{nothing}, and no such {kind} on the Hub, or a private one, for which there is `hf auth login`.{guess}"
        ) from error
    except (errors.HTTPError, OSError) as error:
        reason = first_sentence(error)
        raise ConnectionError(
            f"{nothing}, and the Hub can't be asked for a {kind} of this name ({reason}).{guess}"
        ) from error


def _is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants

    if Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}", "snapshots").is_dir():
        return True
    if kind == "model":
        return False
    from datasets import config

    return Path(config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()
