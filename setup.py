"""What setup.cfg cannot say; the rest is there."""

import re
from pathlib import Path

from setuptools import setup


def make_description(readme: str) -> str:
    """Leave out what is broken on a package index, which has no other files: pictures, and links to pages."""
    parts = re.split(r"(^```.*?^```)", readme, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):  # every other one is code
        parts[i] = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", parts[i], flags=re.MULTILINE)
        parts[i] = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", parts[i])
    return "".join(parts).rstrip() + "\n\nThe pages that are named here are in `docs/` of the source distribution.\n"


if __name__ == "__main__":
    setup(long_description=make_description(Path(__file__).with_name("README.md").read_text(encoding="utf-8")))
