"""What is told about a built site."""

import subprocess
import sys

import pytest
from paths import REPOSITORY

from docs_site.check import find_problems


NAVIGATION = '<nav><ul><li><a href="guide/">Guide</a></li></ul></nav>'


@pytest.fixture
def site(tmp_path):
    for name in ("guide", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "images/a.png").touch()
    (tmp_path / "404.html").write_text('<a href="/nowhere/">a</a>')
    (tmp_path / "site.css").write_text(
        "a { background: url(images/a.png) } b { background: url(data:image/png;base64,AA) }"
    )
    (tmp_path / "index.html").write_text(
        f'{NAVIGATION}<link rel="stylesheet" href="site.css"><link rel="canonical" href="https://example.org/">'
        '<a href="guide/#start">a</a> <a href="https://example.org">b</a> <a href="#top" id="top">c</a>'
    )
    (tmp_path / "guide/index.html").write_text(
        '<h1 id="start">Guide</h1><a href="..">a</a><img src="../images/a.png"><a href="../images/a.png">b</a>'
        '<code>[x]</code><a href="mailto:a@example.org">d</a>'
    )
    return tmp_path


def test_a_whole_site(site):
    assert find_problems(site) == []


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="../nowhere/">a</a>', "../nowhere/ leads nowhere"),
        ('<a href="../#nothing">a</a>', "../#nothing leads nowhere"),
        ('<a href="#nothing">a</a>', "#nothing leads nowhere"),
        ('<a href="../../outside.py">a</a>', "../../outside.py leads nowhere"),
        ('<img src="../images/b.png">', "../images/b.png leads nowhere"),
        ("[<code>Lost</code>]", "[`Lost`] is nothing that there is"),
        *(
            (tag, "https://cdn.example.org/a is fetched from another host")
            for tag in (
                '<script src="https://cdn.example.org/a"></script>',
                '<link rel="stylesheet" href="https://cdn.example.org/a">',
                '<img src="https://cdn.example.org/a">',
            )
        ),
        ('<script src="//cdn.example.org/a"></script>', "//cdn.example.org/a is fetched from another host"),
    ],
)
def test_problems_of_a_page(site, html, problem):
    (site.parent / "outside.py").touch()
    page = site / "guide/index.html"
    page.write_text(page.read_text() + html)
    assert find_problems(site) == [f"guide/index.html: {problem}"]


@pytest.mark.parametrize("css", ["@import 'https://example.org/a';", "a { src: url(https://example.org/a) }"])
def test_styles_from_elsewhere(site, css):
    (site / "site.css").write_text(css)
    assert find_problems(site) == ["site.css: https://example.org/a is fetched from another host"]


def test_a_page_outside_the_navigation(site):
    (site / "lost").mkdir()
    (site / "lost/index.html").write_text("<h1>Lost</h1>")
    home = site / "index.html"
    home.write_text(home.read_text() + '<a href="lost/">linked, but not in the navigation</a>')
    assert find_problems(site) == ["lost/index.html: is not in the navigation"]


def test_exit_status(site):
    command = [sys.executable, REPOSITORY / "docs_site/check.py", site]
    assert subprocess.run(command).returncode == 0
    (site / "site.css").unlink()
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == "index.html: site.css leads nowhere\n"
