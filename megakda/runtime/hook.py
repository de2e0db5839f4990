"""An import hook that adapts megatron-core's modules as they are loaded, and nothing else.

A patch names the module, what it replaces and the replacement; a symbol that is not there any more
raises instead of being added silently. Patching at import reaches every ``from x import y`` that
follows, which patching afterwards does not.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from types import CodeType, ModuleType
from typing import Any

from megakda.errors import RuntimeMismatch

ROOT = "megatron.core"

# module name below ROOT -> function from the loaded module to {symbol: replacement}
Patches = Mapping[str, Callable[[ModuleType], dict[str, Any]]]


def merge(first: Patches, second: Patches) -> Patches:
    """Both tables; a module in both gets both patches, `first` before `second`."""

    def both(name: str) -> Callable[[ModuleType], dict[str, Any]]:
        return lambda module: {**first[name](module), **second[name](module)}

    merged = {**first, **second}
    merged.update({name: both(name) for name in first.keys() & second.keys()})
    return merged


def apply(module: ModuleType, replacements: dict[str, Any]) -> None:
    """Sets `replacements` on `module`, refusing names that it does not have."""
    for name, value in replacements.items():
        if not hasattr(module, name):
            raise RuntimeMismatch(
                f"{module.__name__}.{name} is gone: this megatron-core is not the one that "
                "megakda.runtime adapts"
            )
        setattr(module, name, value)


class _Loader(importlib.machinery.SourceFileLoader):
    patches: Patches
    rewrite: Callable[[CodeType], CodeType] | None

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return self.rewrite(code) if self.rewrite and code else code

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        patch = self.patches.get(module.__name__.removeprefix(ROOT).lstrip("."))
        if patch:
            apply(module, patch(module))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, patches: Patches, rewrite: Callable[[CodeType], CodeType] | None):
        self.patches, self.rewrite = patches, rewrite

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if not (fullname + ".").startswith(ROOT + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            loader = _Loader(spec.loader.name, spec.loader.path)
            loader.patches, loader.rewrite = self.patches, self.rewrite
            spec.loader = loader
        return spec


def install(patches: Patches, rewrite: Callable[[CodeType], CodeType] | None = None) -> None:
    """Adapts every module below ROOT that is imported from now on.

    Args:
        patches: what to replace, per module.
        rewrite: applied to each module's compiled code before it runs.
    """
    sys.meta_path.insert(0, _Finder(patches, rewrite))
