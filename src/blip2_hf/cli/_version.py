"""`blip2-hf --version`: what a bug report needs to say."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__


# What an installation has anyway, from what matters most
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "peft", "numpy", "pillow")


class ShowVersion(argparse.Action):
    """Prints the versions when the option is given, and not when the parser is made. No package is imported."""

    def __init__(self, option_strings: Any, dest: str):
        text = "show the versions of this program, of Python and of the packages below it"
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=text)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any):
        print(f"{parser.prog} {__version__}")
        print(f"Python {platform.python_version()} on {platform.platform()}")
        print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
        parser.exit()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"
