"""Links as GitHub needs them, turned into those of the site by an extension of Python-Markdown."""

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor


REPOSITORY = Path(__file__).parents[1]


class RepositoryLinks(Treeprocessor):
    """Changes links of the changelog into docs/, and links out of docs/, which the site does not hold."""

    def run(self, root: Element):
        for link in list(root.iter("a")):
            target = link.get("href", "")
            path = target.removeprefix("../")
            if target.startswith("docs/"):
                link.set("href", target.removeprefix("docs/"))
            elif path != target and (REPOSITORY / path).exists():
                _show_path(link, path)


def _show_path(link: Element, path: str):
    text = "".join(link.itertext())
    link.tag = "span"
    del link.attrib["href"]
    if text != path:
        link.text, link[:] = f"{text} (", []
        code = Element("code")
        code.text, code.tail = path, ")"
        link.append(code)


class RepositoryLinksExtension(Extension):
    """Adds `RepositoryLinks` to Python-Markdown."""

    def extendMarkdown(self, md: Markdown):
        md.treeprocessors.register(RepositoryLinks(md), "repository_links", 0)


def makeExtension(**kwargs: Any) -> RepositoryLinksExtension:
    return RepositoryLinksExtension(**kwargs)
