"""Check of the built site, for what the strict build does not see: `python docs_site/check.py site`."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


# What a browser fetches without a click
FETCHED = {"iframe": "src", "img": "src", "link": "href", "script": "src", "source": "src"}
NOT_FETCHED = {"alternate", "canonical", "next", "prev"}


class Page(HTMLParser):
    """Links of a page, those of its navigation, what is fetched for it, its anchors, and references left as text."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.navigation: set[str] = set()
        self.fetched: set[str] = set()
        self.anchors = {""}
        self.depth = 0  # of nav
        html = path.read_text()
        self.references = re.findall(r"\[<code>([^<]*)</code>\]", html)
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        self.depth += tag == "nav"
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
            if self.depth:
                self.navigation.add(values["href"])
        elif tag in FETCHED and values.get("rel") not in NOT_FETCHED:
            self.fetched.add(values.get(FETCHED[tag], ""))

    def handle_endtag(self, tag):
        self.depth -= tag == "nav"


def find_problems(site: Path) -> list[str]:
    """
    Find what is wrong with a site.

    Args:
        site (`Path`):
            Folder of the built site.

    Returns:
        `list[str]`: a line for each link and each reference that leads nowhere, each file that a browser would fetch
        from another host, and each page that is missing in the navigation.
    """
    site = site.resolve()
    # The page for what is not found has addresses from the root of a host
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    problems = []
    for path, page in pages.items():
        found = [f"[`{name}`] is nothing that there is" for name in page.references]
        found += [f"{address} is fetched from another host" for address in sorted(page.fetched) if _host(address)]
        for link in sorted(page.links | page.fetched):
            if not _host(link) and not _leads_somewhere(link, path, pages, site):
                found.append(f"{link} leads nowhere")
        problems += [f"{path.relative_to(site)}: {problem}" for problem in found]
    home = site / "index.html"
    listed = {home} | {_target(link, home) for link in pages[home].navigation}
    problems += [f"{path.relative_to(site)}: is not in the navigation" for path in pages if path not in listed]
    for path in sorted(site.rglob("*.css")):
        addresses = re.findall(r"""(?:url\(|@import )["']?((?:https?:)?//[^"')\s]+)""", path.read_text())
        problems += [f"{path.relative_to(site)}: {address} is fetched from another host" for address in addresses]
    return problems


def _host(address: str) -> str:
    return urlsplit(address).scheme or urlsplit(address).netloc


def _target(link: str, path: Path) -> Path:
    address = unquote(urlsplit(link).path)
    target = (path.parent / address).resolve() if address else path
    return target / "index.html" if target.is_dir() else target


def _leads_somewhere(link: str, path: Path, pages: dict[Path, Page], site: Path) -> bool:
    target = _target(link, path)
    if target in pages:
        return unquote(urlsplit(link).fragment) in pages[target].anchors
    return target.is_relative_to(site) and target.exists()


if __name__ == "__main__":
    found = find_problems(Path(sys.argv[1]))
    print("\n".join(found or ["Every link of the site leads somewhere, and nothing comes from another host."]))
    sys.exit(bool(found))
