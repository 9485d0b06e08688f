"""Every merge method by name: `METHODS`, and `SPECS`, the part that can be read without torch.

A method is added by adding one module to this folder that exposes `METHODS: tuple[Method, ...]`; modules
whose name begins with an underscore are shared code. No module here imports torch at its top level.

Imports: `evomerge.recipe`, `evomerge.errors`, `evomerge.sources.layout`; torch, `evomerge.merge.mask` and
`.magnitude` inside functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from evomerge.merge.methods._method import Method
from evomerge.recipe import MethodSpec


def _discover() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        if info.name.startswith("_"):
            continue
        for method in importlib.import_module(f"{__name__}.{info.name}").METHODS:
            assert method.spec.name not in found, f"two modules define the method {method.spec.name}"
            found[method.spec.name] = method
    return found


METHODS: Mapping[str, Method] = MappingProxyType(_discover())
SPECS: Mapping[str, MethodSpec] = MappingProxyType({name: method.spec for name, method in METHODS.items()})

__all__ = ["METHODS", "SPECS", "Method"]
