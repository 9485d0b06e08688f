"""What there is to merge with: every method as a row, as a page, and as JSON, all from its `MethodSpec`.

Imports: `errors`, `merge.methods`, `recipe`, `yamlfile`; never torch.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from evomerge.errors import ConfigError
from evomerge.merge.methods import METHODS
from evomerge.recipe import MethodSpec, ParameterSpec
from evomerge.yamlfile import suggestion

HEADER = ("method", "models", "needs", "mergekit", "parameters", "source")


def table() -> list[list[str]]:
    """One row per method, below `HEADER`; a parameter of each model is marked with `*`."""
    rows = []
    for name in sorted(METHODS):
        spec = METHODS[name].spec
        parameters = [
            *(f"{key}* {_short(parameter)}" for key, parameter in spec.per_model.items()),
            *(f"{key} {_short(parameter)}" for key, parameter in spec.shared.items()),
        ]
        rows.append(
            [
                spec.name,
                models_of(spec),
                spec.needs or "",
                "yes" if spec.mergekit else "no",
                "\n".join(parameters),
                re.split(r"; | \(", spec.source)[0],
            ]
        )
    return rows


def page(name: str) -> str:
    """All about one method.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"`{name}` is not a merge method; {suggestion(name, METHODS)}")
    method = METHODS[name]
    spec = method.spec
    facts = {
        "models": models_of(spec) + (", the base may be one of them" if method.takes_base else ""),
        "needs": f"{spec.needs} statistics of every model" if spec.needs else "",
        "random": "yes, by the recipe's seed" if spec.random else "",
        "mergekit 0.1.5": spec.mergekit or "has no such method; `evomerge merge` merges the recipe",
        "source": spec.source,
    }
    lines = [spec.name, "", *(f"{key}: {value}" for key, value in facts.items() if value), ""]
    for title, parameters in (("per model", spec.per_model), ("for all models", spec.shared)):
        if parameters:
            lines.append(f"Parameters, {title}:")
            lines += [f"  {key} {_short(spec)}: {spec.doc}" for key, spec in parameters.items()]
            lines.append("")
    return "\n".join([*lines, inspect.cleandoc(method.kernel.__doc__ or "")])


def as_json() -> list[dict[str, Any]]:
    """Every method as plain data; a range that is not bounded has null."""
    return [
        {
            "name": spec.name,
            "min_models": spec.min_models,
            "max_models": spec.max_models,
            "base_may_take_part": method.takes_base,
            "needs": spec.needs,
            "random": spec.random,
            "mergekit": spec.mergekit,
            "source": spec.source,
            "per_model": _parameters(spec.per_model),
            "shared": _parameters(spec.shared),
        }
        for method in METHODS.values()
        for spec in [method.spec]
    ]


def models_of(spec: MethodSpec) -> str:
    """How many models a method merges: `2`, `1-2` or `2+`."""
    if spec.max_models is None:
        return f"{spec.min_models}+"
    least = str(spec.min_models)
    return least if spec.min_models == spec.max_models else f"{least}-{spec.max_models}"


def _parameters(specs: Mapping[str, ParameterSpec]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "kind": spec.kind,
            "low": spec.low if math.isfinite(spec.low) else None,
            "low_open": spec.low_open,
            "high": spec.high if math.isfinite(spec.high) else None,
            "default": spec.default,
            "doc": spec.doc,
        }
        for name, spec in specs.items()
    }


def _short(spec: ParameterSpec) -> str:
    """Range and default: `(0, 1] = 1`, `= true`; a parameter without default is `required`."""
    if spec.kind == "bool":
        return f"= {str(spec.default).lower()}"
    left = "(" if spec.low_open or math.isinf(spec.low) else "["
    right = ")" if math.isinf(spec.high) else "]"
    span = f"{left}{spec.low:g}, {spec.high:g}{right}"
    span = "any" if math.isinf(spec.low) and math.isinf(spec.high) else span
    span += " whole" if spec.kind == "int" else ""
    return f"{span}, required" if spec.default is None else f"{span} = {spec.default:g}"
