"""The values in mergekit's YAML: references of models, and parameters as functions of the tensor.

A parameter is a scalar, a gradient (a list of numbers over the depth) or a list of `{filter, value}`. A
filter is a substring of the tensor's name; the first that matches wins. A gradient is linear in t, which is 0
at the first layer and 1 at the last. Booleans are not interpolated: the entry at floor(t * (count - 1))
counts.

Imports: `evomerge.errors`, `yamlfile`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evomerge.errors import RecipeError
from evomerge.yamlfile import suggestion

Value = float | bool
IGNORED = ("int8_mask",)  # saves memory in mergekit; the result is the same


class ModelRef(NamedTuple):
    """`path@revision+lora@revision`; `path` may be the name of an earlier document."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    @property
    def plain(self) -> ModelRef:
        """The model without its adapter."""
        return ModelRef(self.path, self.revision)

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        lora = f"{self.lora}@{self.lora_revision}" if self.lora_revision else self.lora
        return f"{model}+{lora}" if lora else model


class Row(NamedTuple):
    """One line of a parameter: the points of its gradient, for tensors whose name contains `filter`."""

    filter: str | None
    points: tuple[Value, ...]

    def at(self, t: float) -> Value:
        """The value at depth t in [0, 1]."""
        points, last = self.points, len(self.points) - 1
        if isinstance(points[0], bool):
            return points[int(t * last)]
        below = int(t * last)
        fraction = t * last - below
        return (1.0 - fraction) * points[below] + fraction * points[min(last, below + 1)]


Parameters = Mapping[str, tuple[Row, ...]]


def reference(data: Any, where: str) -> ModelRef:
    """A model reference from its text or its mapping form."""
    if isinstance(data, str):
        model, _, lora = data.partition("+")
        return ModelRef(*_revision(model), *(_revision(lora) if lora else ()))
    if isinstance(data, dict) and "model" in data:
        for key in data:
            if key not in ("model", "lora"):
                raise RecipeError(f"{where}: `{key}` is not supported yet; a model has `model` and `lora`")
        adapter = data.get("lora")
        return ModelRef(*_path(data["model"], where), *(_path(adapter, where) if adapter else ()))
    raise RecipeError(f"{where} is {data!r}, but a model is `path@revision+lora`, or a mapping with `model`")


def _revision(text: str) -> tuple[str, str | None]:
    path, _, revision = text.partition("@")
    return path, revision or None


def _path(data: Any, where: str) -> tuple[str, str | None]:
    if isinstance(data, str):
        return _revision(data)
    if isinstance(data, dict) and "path" in data and set(data) <= {"path", "revision"}:
        return str(data["path"]), data.get("revision")
    raise RecipeError(f"{where}: {data!r} must be a text, or a mapping with `path` and `revision`")


def parameters(data: Any, names: Sequence[str], where: str) -> Parameters:
    """Parameters from a mapping, of which `names` are known and `IGNORED` left out."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is {data!r}, but it must be a mapping of names to values")
    for key in data:
        if key not in (*names, *IGNORED):
            raise RecipeError(f"{where}: unknown parameter `{key}`; {suggestion(str(key), names)}")
    return {key: _rows(data[key], f"{where}, `{key}`") for key in names if key in data}


def _rows(data: Any, where: str) -> tuple[Row, ...]:
    """A scalar, a gradient, a list of `{filter, value}` or one such mapping."""
    if isinstance(data, dict):
        data = [data]
    if not (isinstance(data, list) and any(isinstance(item, dict) for item in data)):
        return (Row(None, _points(data, where)),)
    rows = []
    for item in data:
        if not isinstance(item, dict) or "value" not in item or not set(item) <= {"filter", "value"}:
            raise RecipeError(f"{where}: {item!r} must be a mapping with `value` and perhaps `filter`")
        text = item.get("filter")
        if not isinstance(text, str | None):
            raise RecipeError(f"{where}: `filter` is {text!r}, but it must be text; quote it")
        rows.append(Row(None if text == "*" else text, _points(item["value"], where)))
    return tuple(rows)


def _points(data: Any, where: str) -> tuple[Value, ...]:
    items = data if isinstance(data, list) else [data]
    if items and all(isinstance(item, bool) for item in items):
        return tuple(items)
    if items and all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        return tuple(map(float, items))
    raise RecipeError(
        f"{where} is {data!r}, but it must be a number or a boolean, a list of one of the two, or a list of "
        "`{filter, value}`"
    )


def values(
    names: Mapping[str, object], levels: Sequence[Parameters], tensor: str, t: float
) -> dict[str, Any]:
    """The values that the file gives for one tensor; what no level gives is left out."""
    result: dict[str, Any] = {}
    for name in names:
        rows = (row for level in levels for row in level.get(name, ()))
        row = next((row for row in rows if row.filter is None or row.filter in tensor), None)
        if row is not None:
            result[name] = row.at(t)
    return result
