"""What to merge and how: `Recipe`, pure data with a digest and a YAML form.

A recipe assigns one `Setting` (method, shared parameters, parameters per model) to every `Cell` of the
base model. A cell is one (layer, module) pair; tensors outside the numbered layers have layer `None`.
Weights are coefficients of task vectors, density is the fraction KEPT in (0, 1], `lambda` scales the
merged task vector. Values are plain floats and bools, so a recipe crosses a process boundary as JSON.

`MethodSpec` is the part of a merge method that can be known without torch: names, ranges, defaults and
which settings are equivalent. The functions themselves live in `evomerge.merge.methods`.

Imports: `evomerge.errors` only (never torch).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from evomerge.errors import RecipeError

DECIMALS = 6  # recipe values are rounded to this many decimals, so that a YAML file holds them exactly
FORMAT = 1  # version of the recipe's YAML form


class Cell(NamedTuple):
    """The tensors of one module in one layer; `layer` is None outside the numbered layers."""

    layer: int | None
    module: str

    def __str__(self) -> str:
        return self.module if self.layer is None else f"layers[{self.layer}].{self.module}"


@dataclass(frozen=True)
class Setting:
    """How the tensors of a cell are merged.

    Attributes:
        method: name of a merge method, as `evomerge.merge.methods` knows it.
        parameters: shared parameters of the method, for example `{"lambda": 1.0, "normalize": True}`.
        models: parameters per model, for example `{"math": {"weight": 0.7, "density": 0.5}}`, in the
            order of the merge. A model that is absent takes no part; no model at all means the base.
    """

    method: str
    parameters: Mapping[str, float | bool] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain nested dictionaries, parameters sorted by name, models in their order."""
        return {
            "method": self.method,
            "parameters": {key: self.parameters[key] for key in sorted(self.parameters)},
            "models": {
                name: {key: values[key] for key in sorted(values)} for name, values in self.models.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Setting:
        """Inverse of `as_json`."""
        return cls(data["method"], dict(data.get("parameters") or {}), dict(data.get("models") or {}))


BASE_COPY = Setting("task_arithmetic")  # no model takes part: the cell keeps the base model's tensors


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a method: its closed range (`low_open` excludes `low`), default and meaning.

    `default` None means that the parameter is required; `kind` is "float", "int" (a whole number) or
    "bool", which ignores the range. `below`, for a parameter of a model, gives from the model's other values
    a number that it must stay below; `below_doc` says what that number is.
    """

    low: float = -math.inf
    high: float = math.inf
    default: float | bool | None = None
    low_open: bool = False
    kind: str = "float"
    doc: str = ""
    below: Callable[[Mapping[str, float]], float] | None = None
    below_doc: str = ""

    def most(self, values: Mapping[str, float]) -> float:
        """Largest value, to `DECIMALS` decimals, beside the other `values` of the same model."""
        if self.below is None:
            return self.high
        return min(self.high, max(self.low, rounded(self.below(values) - 10.0**-DECIMALS)))

    def check(self, value: object, where: str, name: str) -> None:
        """Raise `RecipeError` unless `value` is a finite number in the range (or a bool, for `kind` bool)."""
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise RecipeError(f"{where}: {name} is {value!r}, but it must be true or false")
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RecipeError(f"{where}: {name} is {value!r}, but it must be a finite number")
        if self.kind == "int" and value != int(value):
            raise RecipeError(f"{where}: {name} is {value!r}, but it must be a whole number")
        below = value <= self.low if self.low_open else value < self.low
        if below or value > self.high:
            left = "(" if self.low_open or math.isinf(self.low) else "["
            right = ")" if math.isinf(self.high) else "]"
            meaning = f" is {self.doc} and" if self.doc else ""
            raise RecipeError(
                f"{where}: {name} is {value!r}, but it{meaning} must be in "
                f"{left}{self.low:g}, {self.high:g}{right}"
            )


@dataclass(frozen=True)
class MethodSpec:
    """What can be known of a merge method without its tensors.

    Attributes:
        name: as in recipes and in mergekit YAML, where mergekit has the method.
        shared: parameters that hold for all models of a cell.
        per_model: parameters that each model has.
        min_models: fewest models that may take part in a cell (0 means the base copy is allowed).
        max_models: most models, None for any number.
        unchanged_is_absent: whether a model whose tensor equals the base's has the same effect as no
            model (true for sums of task vectors, false for averages of whole tensors).
        random: whether the result depends on the recipe's seed.
        mergekit: mergekit's name of the method, None where mergekit 0.1.5 has not got it.
        needs: kind of statistics that every model must carry, as `sources.statistics` knows it.
        source: paper or program that defines it.
        canonical: maps a valid setting to the one that stands for all settings with equal results.
    """

    name: str
    shared: Mapping[str, ParameterSpec]
    per_model: Mapping[str, ParameterSpec]
    canonical: Callable[[Setting], Setting]
    min_models: int = 0
    max_models: int | None = None
    unchanged_is_absent: bool = False
    random: bool = False
    mergekit: str | None = None
    needs: str | None = None
    source: str = ""

    def complete(self, setting: Setting, where: str) -> Setting:
        """Check every value against its range and fill in defaults.

        Raises:
            RecipeError: unknown, missing or out-of-range parameter, or a wrong number of models.
        """
        count = len(setting.models)
        most = math.inf if self.max_models is None else self.max_models
        if not self.min_models <= count <= most:
            allowed = str(self.min_models) if self.min_models == most else f"{self.min_models} to {most}"
            allowed = f"at least {self.min_models}" if self.max_models is None else allowed
            raise RecipeError(f"{where}: {self.name} has {count} models, but it merges {allowed}")
        models = {
            name: _complete(values, self.per_model, f"{where}, model `{name}`", self.name)
            for name, values in setting.models.items()
        }
        return Setting(self.name, _complete(setting.parameters, self.shared, where, self.name), models)


def _complete(
    values: Mapping[str, Any], specs: Mapping[str, ParameterSpec], where: str, method: str
) -> dict[str, float | bool]:
    unknown = [key for key in values if key not in specs]
    if unknown:
        allowed = ", ".join(sorted(specs)) or "none"
        raise RecipeError(f"{where}: {method} has no parameter `{unknown[0]}`; it has: {allowed}")
    result: dict[str, float | bool] = {}
    for key, spec in specs.items():
        value = values.get(key, spec.default)
        if value is None:
            raise RecipeError(f"{where}: {method} needs `{key}`, which has no default; add it")
        spec.check(value, where, key)
        result[key] = value
    for key, spec in specs.items():
        if spec.below is not None and result[key] > spec.most(result):
            raise RecipeError(
                f"{where}: {key} is {result[key]!r}, but it is {spec.doc} and must be below "
                f"{spec.below(result):g}, {spec.below_doc}"
            )
    return result


def rounded(value: float) -> float:
    """`value` to `DECIMALS` decimals, never -0.0."""
    return round(float(value), DECIMALS) + 0.0


@dataclass(frozen=True)
class Recipe:
    """What to merge and how, complete: the same recipe over the same sources gives the same weights.

    Attributes:
        base: name of the base model.
        models: names of all sources that may take part, base excluded, in the order of the run file.
        cells: one setting per cell; cells that are not listed keep the base model's tensors.
        seed: root of the random masks, in [0, 2**32).
        modules: extra module patterns (name -> regular expressions) that the run file added; the
            built-in ones are always there.
    """

    base: str
    models: tuple[str, ...]
    cells: Mapping[Cell, Setting]
    seed: int = 0
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def setting(self, cell: Cell) -> Setting:
        """The setting of `cell`; the base copy where the recipe names none."""
        return self.cells.get(cell, BASE_COPY)

    def seed_for(self, model: str, tensor: str) -> int:
        """Seed of the random mask of one model and tensor, in [0, 2**32)."""
        text = f"{self.seed}\0{model}\0{tensor}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")

    @property
    def digest(self) -> str:
        """64 hexadecimal digits; equal recipes have equal digests, whatever groups they were written in."""
        cells = [
            [cell.layer, cell.module, setting.as_json()]
            for cell, setting in sorted(self.cells.items(), key=lambda item: _cell_order(item[0]))
            if setting != BASE_COPY
        ]
        data = [FORMAT, self.base, cells, self.seed, {k: list(v) for k, v in sorted(self.modules.items())}]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The recipe as plain data, neighbouring layers with equal settings joined into one group."""
        data: dict[str, Any] = {
            "evomerge_recipe": FORMAT,
            "base_model": self.base,
            "models": list(self.models),
            "seed": self.seed,
        }
        if self.modules:
            data["modules"] = {name: list(patterns) for name, patterns in self.modules.items()}
        data["groups"] = list(_groups(self.cells))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Inverse of `as_json`; keys that it does not know are left to the caller.

        Raises:
            RecipeError: a key is missing, or a value has the wrong form; the message begins with `where`.
        """
        if data.get("evomerge_recipe") != FORMAT:
            raise RecipeError(
                f"{where}: `evomerge_recipe` is {data.get('evomerge_recipe')!r}, but this version "
                f"reads format {FORMAT}"
            )
        try:
            cells: dict[Cell, Setting] = {}
            for group in data["groups"]:
                layers = range(*group["layers"]) if group.get("layers") is not None else [None]
                setting = Setting.from_json(group)
                cells.update(
                    {Cell(layer, module): setting for layer in layers for module in group["modules"]}
                )
            return cls(
                base=data["base_model"],
                models=tuple(data["models"]),
                cells=cells,
                seed=int(data.get("seed", 0)),
                modules={k: tuple(v) for k, v in (data.get("modules") or {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"{where}: not a recipe: {type(error).__name__} {error}") from error


def _cell_order(cell: Cell) -> tuple[int, str]:
    return (-1 if cell.layer is None else cell.layer, cell.module)


def _groups(cells: Mapping[Cell, Setting]) -> Iterator[dict[str, Any]]:
    """Groups of cells: runs of layers, then modules that share both the run and the setting."""
    runs: dict[str, list[tuple[int | None, int | None, Setting]]] = {}
    for cell in sorted(cells, key=_cell_order):
        setting = cells[cell]
        row = runs.setdefault(cell.module, [])
        if row and cell.layer is not None and row[-1][1] == cell.layer and row[-1][2] == setting:
            row[-1] = (row[-1][0], cell.layer + 1, setting)
        else:
            row.append((cell.layer, None if cell.layer is None else cell.layer + 1, setting))
    joined: dict[str, tuple[tuple[int | None, int | None], list[str], Setting]] = {}
    for module, row in runs.items():
        for first, last, setting in row:
            key = json.dumps([first, last, setting.as_json()])
            joined.setdefault(key, ((first, last), [], setting))[1].append(module)
    for (first, last), modules, setting in sorted(
        joined.values(), key=lambda group: (-1 if group[0][0] is None else group[0][0], group[1])
    ):
        head: dict[str, Any] = {} if first is None else {"layers": [first, last]}
        yield {**head, "modules": modules, **setting.as_json()}
