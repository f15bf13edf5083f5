"""Imports that wait until they are needed: of this package's modules, and of what it adds to transformers'."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


def lazy_attributes(package: str, exports: dict[str, list[str]]) -> tuple[Callable, Callable, list[str]]:
    """
    Return `__getattr__`, `__dir__` and `__all__` of a package whose modules are imported when their names are first
    used.

    Args:
        package (`str`):
            Name of the package.
        exports (`dict[str, list[str]]`):
            Module of each public name.

    Returns:
        `tuple`: the two functions and the sorted names.
    """
    modules = {name: module for module, names in exports.items() for name in names}

    def __getattr__(name: str):
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return __getattr__, __dir__, sorted(modules)


class _AliasLoader(Loader):
    def __init__(self, target: str):
        self.target = target

    def exec_module(self, module):
        # The import system takes what stands in sys.modules afterwards: one module under both names
        sys.modules[module.__name__] = importlib.import_module(self.target)


class _AliasFinder(MetaPathFinder):
    """Finds modules under the names that they had before."""

    def __init__(self):
        self.targets: dict[str, str] = {}

    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, _AliasLoader(self.targets[fullname])) if fullname in self.targets else None


_aliases = _AliasFinder()


def alias_modules(package: str, targets: dict[str, str]):
    """
    Keep old names of modules for `import`.

    Args:
        package (`str`):
            Name of the package.
        targets (`dict[str, str]`):
            Of each old name, the name that the module has now, both within the package.
    """
    _aliases.targets |= {f"{package}.{old}": f"{package}.{new}" for old, new in targets.items()}
    if _aliases not in sys.meta_path:
        sys.meta_path.append(_aliases)


class _ImportWatcher(MetaPathFinder):
    """
    Calls back when modules have been imported, after the outermost import of the packages is done: none of their
    modules is then half initialised.
    """

    def __init__(self, *packages: str):
        self.packages = packages
        self.callbacks: dict[str, list[Callable[[], None]]] = {}
        self.depth = 0

    def find_spec(self, fullname, path=None, target=None):
        if self.callbacks and fullname.partition(".")[0] in self.packages:
            for finder in sys.meta_path:
                spec = None if finder is self else finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader.exec_module = partial(self._exec_module, spec.loader.exec_module)
                    return spec
        return None

    def _exec_module(self, exec_module: Callable, module):
        self.depth += 1
        try:
            exec_module(module)
        finally:
            self.depth -= 1
        self.run_callbacks()

    def run_callbacks(self):
        while self.depth == 0 and (ready := [name for name in self.callbacks if name in sys.modules]):
            self.depth += 1
            try:
                for callback in self.callbacks.pop(ready[0]):
                    callback()
            finally:
                self.depth -= 1


_watcher = _ImportWatcher("transformers", "blip2_hf")


def when_imported(module: str, callback: Callable[[], None]):
    """
    Call `callback` once `module`, of transformers, has been imported: at once if it has been.

    Args:
        module (`str`):
            Full name of the module.
        callback (`Callable`):
            Function without arguments.
    """
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
    _watcher.callbacks.setdefault(module, []).append(callback)
    _watcher.run_callbacks()
