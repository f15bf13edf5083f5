"""What an installation of nothing but the wheel has to do. `check.py` runs it in a folder that is empty."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from transformers import pipeline

import blip2_hf


# Which module needs which package of an extra
OF_EXTRAS = {
    "blip2_hf.evaluation.metrics.evaluate_module": "evaluate",
    "blip2_hf.multi_vector": "sentence_transformers",
    "blip2_hf.web_page": "gradio",
}


def run(*arguments: str) -> str:
    """Run the command that the wheel has installed."""
    command = [str(Path(sys.executable).with_name("blip2-hf")), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def import_all():
    """Import every module, of which those of extras alone may lack a package."""
    names = {module.name for module in pkgutil.walk_packages(blip2_hf.__path__, "blip2_hf.", onerror=_fail)}
    for name in sorted(names - {"blip2_hf.cli.__main__", *OF_EXTRAS}):
        importlib.import_module(name)
    for name, package in OF_EXTRAS.items():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name == package, error
        else:
            raise AssertionError(f"{package} is installed, and this is no base installation")
    print(f"{len(names)} modules are there, of which {len(OF_EXTRAS)} need a package of an extra")


def _fail(name: str):
    raise ImportError(f"{name} cannot be imported")


def check_version():
    """Compare the version of the metadata with that of the package and of the command."""
    printed = run("--version")
    assert printed.splitlines()[0] == f"blip2-hf {blip2_hf.__version__}" == f"blip2-hf {version('blip2-hf')}"
    print(printed, end="")


def check_captions(helpers: Path):
    """Caption a picture with a tiny model, by the command and by the pipeline."""
    sys.path.append(str(helpers))  # has no module of the package
    from saved_models import save_captioner
    from tiny import make_image

    save_captioner(Path("captioner"), with_code=True)  # writes the card, whose template is a file of the package
    assert "blip2-hf" in Path("captioner", "README.md").read_text()
    make_image(0).save("picture.png")
    printed = run("caption", "picture.png", "--model", "captioner", "--max-new-tokens", "8", "--num-beams", "1")
    (found,) = pipeline("image-to-text", model="captioner")("picture.png", max_new_tokens=8, num_beams=1)
    assert found["generated_text"] and found["generated_text"] in printed, (found, printed)
    print(f"a picture has the caption {found['generated_text']!r}")


def main():
    root = Path(blip2_hf.__file__).parent
    assert root.is_relative_to(sys.prefix) and (root / "py.typed").is_file(), root
    check_version()
    import_all()
    check_captions(Path(__file__).parents[1] / "helpers")


if __name__ == "__main__":
    main()
