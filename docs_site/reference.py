"""
The API reference: an extension of griffe, with which mkdocstrings reads sources. Names become those that users know,
and docstrings become Markdown whose references are links. Nothing of the package is imported.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import griffe

from docs_site.docstrings import link_references, to_markdown


PAGES = Path(__file__).parents[1] / "docs" / "api"
# References to what these have are code, because their documentation has no list of names
OTHER_PACKAGES = ("huggingface_hub", "peft", "torch", "transformers")


def objects_of(module: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    """Return what is defined in a module: in its classes and in its submodules too."""
    for member in module.members.values():
        if not member.is_alias:
            yield member
            if member.is_module or member.is_class:
                yield from objects_of(member)


def use_public_names(package: griffe.Module):
    """Let classes such as `Blip2HfConfig` have the names that their modules give them, as in `Blip2Config = ...`."""
    for found in list(objects_of(package)):
        if found.is_attribute and found.parent.is_module and isinstance(found.value, griffe.ExprName):
            module, private = found.parent, found.value.name
            if private in module.members and module.members[private].is_class:
                renamed = module.members[private]
                renamed.name = found.name
                module.members[found.name] = renamed
                module.members[private] = griffe.Alias(private, target=renamed, parent=module)


def unhide_functions(objects: list[griffe.Object]):
    """Let `metrics.chair` be the function that the package imports, and not the module of the same name."""
    for found in objects:
        if found.is_module and found.name in found.members and found.name in (found.parent.exports or ()):
            function = found.members[found.name]
            found.parent.members[found.name] = griffe.Alias(found.name, target=function, parent=found.parent)


def read_pages(package: griffe.Module, pages: Path = PAGES) -> dict[str, griffe.Object]:
    """
    Read what the reference documents from lines of its pages such as `::: blip2_hf.data`.

    Args:
        package (`griffe.Module`):
            The whole package.
        pages (`Path`, *optional*):
            Folder of the pages.

    Returns:
        `dict[str, griffe.Object]`: classes, functions and values by their paths; those of modules one by one.
    """
    documented = {}
    for page in sorted(pages.glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE):
            found = package[path.removeprefix(f"{package.path}.")]
            members = public_members(found, path) if found.is_module else {path: found}
            documented |= {path: defined(member) for path, member in members.items() if not member.is_module}
    return documented


def defined(member: griffe.Object | griffe.Alias) -> griffe.Object:
    return member.final_target if member.is_alias else member


def public_members(found: griffe.Object, path: str) -> dict[str, griffe.Object]:
    """Return the public members of a module or a class, by their paths."""
    return {f"{path}.{name}": member for name, member in found.members.items() if member.is_public}


def adopt_members(documented: dict[str, griffe.Object]):
    """Give classes the members that they inherit from classes which are not documented, such as mixins."""
    definitions = {found.path for found in documented.values()}
    for found in documented.values():
        if found.is_class:
            for name, member in found.inherited_members.items():
                if member.final_target.parent.path not in definitions:
                    found.members[name] = griffe.Alias(name, target=member.final_target, parent=found)


class Names:
    """
    What the names in references mean.

    Args:
        documented (`dict[str, griffe.Object]`):
            What the reference documents, by its path.
        objects (`list[griffe.Object]`):
            All that is defined in the package.
    """

    def __init__(self, documented: dict[str, griffe.Object], objects: list[griffe.Object]):
        self.all_paths = [found.path for found in objects]
        members = [public_members(found, path) for path, found in documented.items() if found.is_class]
        # Where each documented path is defined, and where each definition is documented first
        self.definitions = {
            path: defined(found).path for paths in (documented, *members) for path, found in paths.items()
        }
        self.documented = {definition: path for path, definition in reversed(self.definitions.items())}

    def find(self, name: str, module: griffe.Module) -> str | None:
        """
        Return the path that the reference documents under a name.

        Args:
            name (`str`):
                A name with or without what is in front of it, such as `load_rows` or `data.load_rows`.
            module (`griffe.Module`):
                The module whose docstring has it: its own names and imports come first.

        Returns:
            `str`: the path; empty if it is not documented. `None` if there is nothing of the name, or several things.
        """
        if name.partition(".")[0] in OTHER_PACKAGES:
            return ""
        if name in module.members:
            try:
                return self.documented.get(module[name].canonical_path, "")
            except griffe.AliasResolutionError:
                return ""  # it is of another package
        paths = [path for path in [*self.definitions, *self.documented] if f".{path}".endswith(f".{name}")]
        if paths:
            is_one = len({self.definitions.get(path, path) for path in paths}) == 1
            return self.documented.get(paths[0], paths[0]) if is_one else None
        return "" if any(path.endswith(f".{name}") for path in self.all_paths) else None


class HuggingFaceDocstrings(griffe.Extension):
    """Gives mkdocstrings the names that users know, and docstrings as Markdown."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any):
        use_public_names(pkg)
        objects = [pkg, *objects_of(pkg)]
        loader.resolve_aliases(external=False)
        unhide_functions(objects)
        documented = read_pages(pkg)
        adopt_members(documented)
        names = Names(documented, objects)
        for found in objects:
            if found.docstring is not None:
                find = partial(names.find, module=found if found.is_module else found.module)
                try:
                    found.docstring.value = link_references(to_markdown(found.docstring.value), find)
                except ValueError as error:
                    raise ValueError(f"Docstring of {found.path}: {error}") from error
