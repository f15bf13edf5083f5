"""Docstrings in the Hugging Face grammar, as Markdown and as HTML."""

import pytest

from docs_site.docstrings import link_references, to_markdown


DOCSTRING = """Cut pictures.

Args:
    pixel_values (`torch.Tensor` of shape `(num_images, channels,
        height, width)`, *optional*):
        Images, as one of:

        - a tensor
        - a list
    size, scale (`int`, *optional*, defaults to `224`):
        Side: in pixels.
    kwargs:
        As for [`crop`].

Returns:
    `torch.Tensor` of shape `()`: the first line
    and the second.

Raises:
    ValueError: if there is none,
        or too many.
    `TypeError`: if `size: int` is none.

Example:

```python
>>> cut(2)
1
```"""


def test_sections_become_markdown():
    assert to_markdown(DOCSTRING).rstrip() == (
        """Cut pictures.

**Arguments**

`pixel_values` (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*)
:   Images, as one of:

    - a tensor
    - a list

`size`, `scale` (`int`, *optional*, defaults to `224`)
:   Side: in pixels.

`kwargs`
:   As for [`crop`].

**Returns**

`torch.Tensor` of shape `()`: the first line
and the second.

**Raises**

`ValueError`
:   if there is none,
    or too many.

`TypeError`
:   if `size: int` is none.

**Example**

```pycon
>>> cut(2)
1
```"""
    )


def test_markdown_becomes_lists():
    markdown = pytest.importorskip("markdown", reason="it comes with the extra docs")
    html = markdown.markdown(to_markdown(DOCSTRING), extensions=["def_list", "fenced_code"])
    assert html.count("<dt>") == 5 and html.count("<dd>") == 5
    assert "<li>a list</li>" in html and html.count("<code>pixel_values</code>") == 1


def test_text_that_is_no_item_is_told():
    with pytest.raises(ValueError, match="'and more'"):
        to_markdown("Cut.\n\nRaises:\n    ValueError: if there is none\n    and more")


def test_references():
    paths = {"Config": "lib.Config", "data.load": "lib.data.load", "torch.nn.Linear": ""}
    text = "[`Config`] [`~data.load`] [`data.load`] [`~torch.nn.Linear`] [`Lost`] [`Config`](a.md) `Config`"
    assert link_references(text, paths.get) == (
        "[`Config`][lib.Config] [`load`][lib.data.load] [`data.load`][lib.data.load] `torch.nn.Linear` [`Lost`] "
        "[`Config`](a.md) `Config`"
    )
