"""Docstrings in the Hugging Face grammar, as Markdown."""

import re
import textwrap
from collections.abc import Callable


_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):\n((?:(?: {4}.*)?(?:\n|$))+)", flags=re.MULTILINE)
_ITEM = re.compile(r"^(?=\S)", flags=re.MULTILINE)
_ARGUMENT = re.compile(r"(?P<names>[\w*, ]+?)(?: \((?P<type>.*)\))?:\s+(?P<text>.*)", flags=re.DOTALL)
_ERROR = re.compile(r"`?(?P<names>[\w., ]+?)`?:\s+(?P<text>.*)", flags=re.DOTALL)
_REFERENCE = re.compile(r"\[`(?P<short>~?)(?P<name>[\w.]+)`\](?![(\[])")


def to_markdown(docstring: str) -> str:
    """
    Turn a docstring in the Hugging Face grammar into Markdown: arguments and errors become lists of definitions, and
    examples become console sessions.

    Args:
        docstring (`str`):
            Text of the docstring, without the indentation of the source.

    Returns:
        `str`: the Markdown. References are left as they are.
    """
    markdown = _SECTION.sub(lambda match: _section(match[1], textwrap.dedent(match[2]).strip("\n")), docstring)
    markdown = re.sub(r"^Example:$", "**Example**", markdown, flags=re.MULTILINE)
    return markdown.replace("```python\n>>>", "```pycon\n>>>")


def _section(title: str, text: str) -> str:
    if title == "Returns":
        return f"**Returns**\n\n{text}\n\n"
    items = [
        _definition(item, _ERROR if title == "Raises" else _ARGUMENT) for item in _ITEM.split(text) if item.strip()
    ]
    return f"**{'Arguments' if title == 'Args' else title}**\n\n" + "\n".join(items) + "\n"


def _definition(item: str, grammar: re.Pattern) -> str:
    match = grammar.fullmatch(item.strip())
    if match is None:
        raise ValueError(f"This is no item of the section in the Hugging Face grammar: {item!r}")
    term = ", ".join(f"`{name.strip()}`" for name in match["names"].split(","))
    if match.groupdict().get("type"):
        term += f" ({' '.join(match['type'].split())})"
    first, _, rest = match["text"].partition("\n")
    return f"{term}\n:   " + "\n".join([first, textwrap.indent(textwrap.dedent(rest), "    ")]).rstrip() + "\n"


def link_references(markdown: str, find: Callable[[str], str | None]) -> str:
    """
    Turn references into links, or into code.

    Args:
        markdown (`str`):
            Text with references such as [`Blip2Config`] or [`~data.load_rows`]; a `~` leaves the last name alone.
        find (`Callable`):
            Returns, for a name, the path under which the reference documents it; an empty text if it is not
            documented; `None` if there is nothing of the name.

    Returns:
        `str`: the Markdown. A reference that leads nowhere is left as it is, which `check.py` tells.
    """

    def replace(match: re.Match) -> str:
        path = find(match["name"])
        if path is None:
            return match[0]
        name = match["name"].rpartition(".")[2] if match["short"] and path else match["name"]
        return f"[`{name}`][{path}]" if path else f"`{name}`"

    return _REFERENCE.sub(replace, markdown)
