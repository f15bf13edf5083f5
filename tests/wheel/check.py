"""
Check of what is published, `python tests/wheel/check.py dist`: the files of the source distribution and of the wheel,
and whether the wheel works in a new environment, outside of the checkout, with nothing but what it requires.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


REPOSITORY = Path(__file__).parents[2]
OF_A_CHECKOUT = (".ci/", ".gitignore")
GENERATED = ("PKG-INFO", "setup.cfg", "src/blip2_hf.egg-info/")


def check_source(sdist: Path):
    """Compare the source distribution with what git tracks or does not ignore."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    expected = {name for name in tracked if not name.startswith(OF_A_CHECKOUT) and (REPOSITORY / name).exists()}
    compare(sdist, {name for name in names if name in expected or not name.startswith(GENERATED)}, expected)


def check_wheel(wheel: Path):
    """Compare the wheel with the package in src/."""
    source = REPOSITORY / "src"
    files = [path for path in (source / "blip2_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    compare(wheel, names, {path.relative_to(source).as_posix() for path in files})


def compare(archive: Path, found: set[str], expected: set[str]):
    """Stop if files are missing or should not be there."""
    if found != expected:
        sys.exit(f"{archive.name} lacks {sorted(expected - found)}, and should not have {sorted(found - expected)}.")
    print(f"{archive.name}: {len(found)} files, as they should be", flush=True)


def try_wheel(wheel: Path, folder: Path):
    """Install the wheel in an environment in the folder, and use it from an empty folder."""
    # Not the packages of who runs this
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    venv.create(folder / "environment", with_pip=True)
    python = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["-c", REPOSITORY / "constraints.txt"]
    run = {"cwd": folder / "empty", "env": environment, "check": True}
    run["cwd"].mkdir()
    subprocess.run([*install, wheel], **run)
    subprocess.run([python, "-I", Path(__file__).with_name("smoke.py")], **run)


def main():
    dist = Path(sys.argv[1]).resolve()
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    check_source(sdist)
    check_wheel(wheel)
    with tempfile.TemporaryDirectory(prefix="blip2_hf-wheel-") as folder:
        try_wheel(wheel, Path(folder))


if __name__ == "__main__":
    main()
