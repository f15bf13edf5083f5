"""Links as GitHub needs them, on the site."""

import pytest


markdown = pytest.importorskip("markdown", reason="it comes with the extra docs")


def render(text: str) -> str:
    return markdown.markdown(text, extensions=["docs_site.links"])


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("[`examples/demo.py`](../examples/demo.py)", "<span><code>examples/demo.py</code></span>"),
        ("[the *demo*](../examples/demo.py)", "<span>the demo (<code>examples/demo.py</code>)</span>"),
        ("[data](docs/data.md#rows)", '<a href="data.md#rows">data</a>'),
        ("[data](data.md)", '<a href="data.md">data</a>'),
        ("[guide](../guide.md)", '<a href="../guide.md">guide</a>'),  # of a page in a folder of docs/
        ("[a](../examples/no_such_file.py)", '<a href="../examples/no_such_file.py">a</a>'),  # told by the check
        ("[a](https://example.org/docs/a)", '<a href="https://example.org/docs/a">a</a>'),
    ],
)
def test_links(text, html):
    assert render(text) == f"<p>{html}</p>"
