"""The tests/ folder of the installed transformers, from its source package on the package index."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from functools import lru_cache
from pathlib import Path

import transformers
from filelock import FileLock
from PIL import Image


NAME = "transformers_tests"  # not "tests", which is this repository's own folder


class Unavailable(Exception):
    """Says why the source package cannot be had."""


def cache_folder():
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "blip2_hf" / "transformers_tests"


def fetch(folder):
    """Writes transformers' tests to `folder`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        # no binary of transformers alone: pip asks the package for its metadata, and the tools for that may be wheels
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "transformers", "--dest", work, f"transformers=={transformers.__version__}"]
        environment = {**os.environ, "PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "15"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        archives = list(Path(work).glob("transformers-*.tar.gz"))
        if done.returncode or not archives:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise Unavailable(f"pip download failed: {errors[-1] if errors else done.stderr[-300:]}")
        unpacked = Path(work) / "unpacked"
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                _, _, path = member.name.partition("/")
                if member.isfile() and path.startswith("tests/") and ".." not in path:
                    target = unpacked / NAME / path.removeprefix("tests/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.extractfile(member) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
        if not (unpacked / NAME / "test_modeling_common.py").exists():
            raise Unavailable("its source package has no tests/test_modeling_common.py")
        (unpacked / NAME / "__init__.py").touch()
        unpacked.rename(folder)


def stub(name, **attributes):
    """Puts a module in the place of one that the package lacks; a later package that has it wins."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        sys.modules[name] = types.ModuleType(name, "Stands in for a file that the source package lacks.")
        vars(sys.modules[name]).update(attributes)


def local_path(url):
    """The pictures of transformers' tests lie on the Hub; any picture does."""
    path = cache_folder() / Path(url).name
    if path.suffix != ".png":
        return url
    if not path.exists():
        Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(path)
    return str(path)


@lru_cache(maxsize=1)
def _prepare():
    try:
        importlib.import_module("parameterized")
    except ImportError:
        return "the package parameterized is not installed"
    folder = cache_folder() / transformers.__version__
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                fetch(folder)
    except (Unavailable, OSError) as error:
        return str(error)
    sys.path.append(str(folder))
    config_kwargs = {"return_dict": False, "output_hidden_states": True, "dtype": "float16", "num_labels": 7}
    stub(f"{NAME}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    stub(f"{NAME}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    stub(f"{NAME}.utils.test_configuration_utils", config_common_kwargs=config_kwargs)
    stub("fetch_hub_objects_for_ci", url_to_local_path=local_path)
    return None


def load(module):
    """`load("test_modeling_common")` is that module of the installed transformers' tests, or raises `Unavailable`."""
    if reason := _prepare():
        raise Unavailable(f"transformers {transformers.__version__}'s tests cannot be had: {reason}")
    return importlib.import_module(f"{NAME}.{module}")
