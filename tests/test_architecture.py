"""Which room of the package imports from which, and that models/ is what travels to the Hub."""

import ast
from pathlib import Path

import pytest

import blip2_hf
from blip2_hf.hub.remote_code import all_source_names


PACKAGE = Path(blip2_hf.__file__).parent
# Each room may import from those behind it in one of the rows
ARROWS = [
    "cli capfilt captioning retrieval data jobs models",
    "cli capfilt evaluation retrieval data jobs models",
    "cli capfilt search retrieval data jobs models",
    "rewards capfilt evaluation retrieval data jobs models",
    "cli web_page captioning retrieval data jobs models",
    "cli web_page search retrieval data jobs models",
    "cli web_page attention_maps models",
    "multi_vector models",
    "cli convert jobs models",
    "cli export jobs models",
    "cli training evaluation retrieval data jobs models",
    "cli training hub jobs models",
]
ROOMS = {name for row in ARROWS for name in row.split()}
# What a model asks for when it is pushed, if the package is installed
EXCEPTIONS = {("models/_hub_mixin.py", "hub")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Return what a file imports from below the package, by the name of its room, also within functions."""
    folder, rooms = path.relative_to(PACKAGE).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            package = ["blip2_hf", *folder][: len(folder) + 2 - node.level] if node.level else []
            names = [".".join([*package, node.module or "", alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        modules = [[part for part in name.split(".") if part] for name in names]
        rooms |= {module[1] for module in modules if module[0] == "blip2_hf" and len(module) > 1}
    return rooms


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) in ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_one_way(path):
    name = path.relative_to(PACKAGE).as_posix()
    rows = [row.split() for row in ARROWS]
    behind = {other for row in rows if room_of(path) in row for other in row[row.index(room_of(path)) :]}
    if room_of(path) != "models":
        # What is above all rooms, such as the version; models/ has nothing of it
        behind |= {other for other in imported_rooms(path) if other not in ROOMS}
    wrong = {other for other in imported_rooms(path) - behind if (name, other) not in EXCEPTIONS}
    assert not wrong, f"{name} imports from {sorted(wrong)}"


def test_every_module_is_in_a_room():
    assert {room_of(path) for path in PACKAGE.rglob("*.py") if not room_of(path).startswith("_")} == ROOMS


def test_models_is_what_travels_to_the_hub():
    found = {path.name for path in (PACKAGE / "models").iterdir()} - {"__pycache__"}
    assert found == all_source_names() | {"__init__.py"}
