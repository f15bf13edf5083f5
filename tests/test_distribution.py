"""What is published beside the code: the description, the versions that are required, and the files at the top."""

import configparser
import re
import runpy

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from paths import REPOSITORY
from PIL import Image

from blip2_hf.models import image_fetching, image_loading


TOP = {name: (REPOSITORY / name).read_text() for name in ("CONTRIBUTING.md", "README.md", "SECURITY.md")}
make_description = runpy.run_path(str(REPOSITORY / "setup.py"), run_name="setup")["make_description"]


def test_a_description_has_what_an_index_can_show():
    code = "```python\nscores[0](x)\n![no](picture.png)\n[no](link)\n```"
    readme = (
        f"A [page](docs/a.md#b) of [others](https://example.org/a).\n\n![Two\nlines](a.png)\n\n{code}\nSee [x](y).\n"
    )
    expected = f"A page of [others](https://example.org/a).\n\n{code}\nSee x.\n\nThe pages that are named here are in "
    assert make_description(readme) == f"{expected}`docs/` of the source distribution.\n"


def test_the_description_keeps_the_text_and_the_code():
    readme, description = TOP["README.md"], make_description(TOP["README.md"])
    fenced = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
    assert fenced.findall(description) == fenced.findall(readme)
    assert set(re.findall(r"\]\(([^)]*)\)", fenced.sub("", description))) == {
        link for link in re.findall(r"\]\(([^)]*)\)", fenced.sub("", readme)) if link.startswith("https://")
    }
    assert re.findall(r"^#+ .*", description, flags=re.MULTILINE) == re.findall(r"^#+ .*", readme, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TOP[name])
    assert links and not [link for link in links if not (REPOSITORY / link).exists()]


def test_the_limits_that_are_told_are_those_of_the_code():
    rows = re.findall(r"^\| .+? \| ([0-9].*?) \|", TOP["SECURITY.md"], flags=re.MULTILINE)
    # Not imported, because it needs gradio
    (upload,) = re.findall(r'^MAX_FILE_SIZE = "(\d+)mb"$', (REPOSITORY / "src/blip2_hf/web_page.py").read_text(), re.M)
    timeout = image_loading.load_image.__defaults__[1]
    assert rows == [
        f"{image_fetching.MAX_BYTES // 2**20} MiB",
        f"{timeout:g}",
        f"{image_fetching._MAX_REDIRECTS}",
        f"{Image.MAX_IMAGE_PIXELS:,}",
        f"{image_loading._LONGEST_HEAD // 2**20} MiB",
        f"{upload} MB",
    ]


def test_the_citation_names_what_it_has_to():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] and citation["authors"]
    settings = read_settings()
    assert citation["license"] == settings["metadata"]["license_expression"]
    (paper,) = citation["references"]
    assert f"Paper = {paper['url']}" in settings["metadata"]["project_urls"]


def read_settings() -> configparser.ConfigParser:
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    return settings


def test_extras_that_are_named_are_there():
    files = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("src/**/*.py")]
    named = {name for file in files for name in re.findall(r"(?:blip2-hf|\.)\[(\w+)\]", file.read_text())}
    assert len(named) > 5 and named <= set(read_settings()["options.extras_require"])


# Extras whose lower bounds no test runs on, which constraints-oldest.txt says
NOT_IN_THE_SUITE = {"gguf", "gradio", "spacy", "tensorboard"}


def test_the_oldest_versions_are_the_lower_bounds():
    settings = read_settings()
    extras = settings["options.extras_require"]
    required = bounds(settings["options"]["install_requires"]) | bounds(extras["test"])
    text = (REPOSITORY / "constraints-oldest.txt").read_text()
    pins = [pin.split("==") for pin in re.findall(r"^[^#\s].*", text, flags=re.MULTILINE)]
    assert {name: Version(version) for name, version in pins} == required and len(pins) == len(required)
    others = {name: bound for extra in extras if extra != "docs" for name, bound in bounds(extras[extra]).items()}
    assert others.items() - required.items() == {(name, others[name]) for name in NOT_IN_THE_SUITE}
    assert all(name in text for name in NOT_IN_THE_SUITE)


def bounds(lines: str) -> dict[str, Version]:
    """Return the lower bound of each package; there is no other one."""
    requirements = [Requirement(line) for line in lines.split()]
    found = {requirement.name: list(requirement.specifier) for requirement in requirements}
    assert all([bound.operator for bound in specifier] == [">="] for specifier in found.values()), lines
    return {name: Version(specifier[0].version) for name, specifier in found.items()}
