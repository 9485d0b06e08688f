"""The search space: which parameters a search varies, and the recipe that their values stand for.

A space divides the cells of a model into groups: layer groups (equal blocks, explicit ranges, or `smooth`
with knots interpolated over depth) times module groups. Every group has a weight per model and, where
one of its methods knows them, a density, a `lambda` and so on, shared by the models of the group; with
several methods the choice of method is a parameter too. Tensors outside the numbered layers form groups
of their own (`outside: own`) or follow the first layer group (`outside: first`, which is how a mergekit
gradient treats them). With `lines` a group has one value of everything for all layers, and two numbers
that scale its task vector by depth. A method that takes one or two models gets those of largest weight. Where
no method has weights (`karcher`, `sce`) a space may leave `weight` out, and all models take part; bounds of
`weight` then say which: those whose weight is above 0.

`SearchSpace` is what the YAML file says. `bind` fits it to one `Family` of models and gives a `BoundSpace`
with `parameters`, `decode` and `encode`. Parameters that can change nothing (no model touches their
cells) are left out.

Imports: `recipe`, `errors`, `layers`, `space_checks`, `sources.layout`, `search.base` (the parameter types);
never torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from evomerge.errors import ConfigError, RecipeError
from evomerge.layers import Bounds, Layers, Lines, Smooth, layer_spans
from evomerge.recipe import BASE_COPY, Cell, MethodSpec, Recipe, Setting, rounded
from evomerge.search.base import CategoricalParameter, FloatParameter, Parameter, Params
from evomerge.sources.layout import Layout
from evomerge.space_checks import LAMBDA, WEIGHT, check_space
from evomerge.yamlfile import Section

ALPHA, BETA = "lines.alpha", "lines.beta"  # parameters that are no method's, so that no name can clash


class SearchSpace(Section):
    """A search space as its YAML file states it.

    Attributes:
        description: one line for people.
        layers: "all" (one group), equal `blocks`, explicit `ranges`, `smooth` knots, or `lines`, which
            searches `alpha` and `beta` of a `lambda` that is linear in depth.
        modules: "all", "each" (every module that the model has), or named groups of modules; modules in
            no group form the group `rest`.
        outside: whether tensors outside the layers have groups of their own or follow the first layer.
        methods: one or several; several make the method a categorical parameter of each group.
        parameters: bounds of `weight` and of the methods' other parameters. What has no bounds here keeps
            its value from `constants`, or the method's default; a weight, 1. Where a method limits one
            value by another, as epsilon by the density, values above the limit stand for the limit.
        constants: fixed values of method parameters, `weight` among them (with `lines` only: nothing else
            would be left of the models).
    """

    description: str = ""
    layers: Layers = "all"
    modules: Literal["all", "each"] | dict[str, list[str]] = "all"
    outside: Literal["own", "first"] = "own"
    methods: Annotated[list[str], Field(min_length=1)]
    parameters: dict[str, Bounds] = Field(default_factory=dict)
    constants: dict[str, bool | float] = Field(default_factory=dict)

    def bind(self, family: Family, where: str = "search space") -> BoundSpace:
        """Fit the space to a family of models; `where` names the file in messages.

        Raises:
            ConfigError: unknown method or module, bounds outside a method's range, ranges that do not
                cover the layers, a model without the statistics that a method needs, or nothing to search.
        """
        check_space(self, family, where)
        modules = _module_groups(self.modules, family.layout, where)
        spans = layer_spans(self.layers, family.layout.n_layers, where)
        space = BoundSpace(self, family, modules, spans)
        if not any(family.changes.values()):
            raise ConfigError(f"{where}: no model changes any tensor, so there is nothing to search")
        if not space.parameters:
            raise ConfigError(
                f"{where}: `{self.methods[0]}` without `parameters` is one recipe, so there is nothing to "
                "search; give a parameter `low` and `high`, or name several `methods` "
                f"(`evomerge methods {self.methods[0]}` lists its parameters)"
            )
        return space


@dataclass(frozen=True)
class Family:
    """What can be merged: a base model's cells, the models and what each may change.

    Attributes:
        layout: cells of the base model.
        changes: per model the cells that it may change; its keys are the models, in order.
        specs: the merge methods by name.
        base: name of the base model.
        seed: root of the random masks, copied into every recipe that draws some. The others have 0, so that
            runs of different seeds know them by the same digest.
        statistics: kinds of statistics that each model carries.
    """

    layout: Layout
    changes: Mapping[str, AbstractSet[Cell]]
    specs: Mapping[str, MethodSpec]
    base: str = "base"
    seed: int = 0
    statistics: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in order."""
        return tuple(self.changes)

    def recipe(self, cells: Mapping[Cell, Setting]) -> Recipe:
        """A recipe in canonical form: settings with equal results give equal digests.

        Raises:
            RecipeError: a method refuses its parameters.
        """
        canonical: dict[Cell, Setting] = {}
        done: dict[tuple[int, tuple[str, ...]], Setting] = {}  # the cells of a group share one setting
        for cell, setting in cells.items():
            spec = self.specs[setting.method]
            models = setting.models
            if spec.unchanged_is_absent:
                models = {name: v for name, v in models.items() if cell in self.changes.get(name, ())}
            elif not any(cell in self.changes.get(name, ()) for name in models):
                models = {}
            if not models:
                continue
            key = (id(setting), tuple(models))
            if key not in done:
                complete = spec.complete(Setting(setting.method, setting.parameters, models), str(cell))
                done[key] = spec.canonical(complete)
            result = done[key]
            if result != BASE_COPY:
                canonical[cell] = result
        random = any(self.specs[setting.method].random for setting in canonical.values())
        seed = self.seed if random else 0
        return Recipe(self.base, self.models, canonical, seed=seed, modules=self.layout.extra_modules)


def _module_groups(
    modules: Literal["all", "each"] | Mapping[str, Sequence[str]], layout: Layout, where: str
) -> dict[str, str]:
    """Module -> name of its group."""
    present = list(dict.fromkeys(cell.module for cell in layout.by_cell))
    if modules == "all":
        return dict.fromkeys(present, "all")
    if modules == "each":
        return {module: module for module in present}
    groups: dict[str, str] = {}
    known = set(layout.modules)
    for group, members in modules.items():
        for module in members:
            if module not in known:
                raise ConfigError(
                    f"{where}: `modules.{group}` names `{module}`, which is no module; "
                    f"known: {', '.join(sorted(known))}"
                )
            if module in groups:
                raise ConfigError(
                    f"{where}: module `{module}` is in the groups `{groups[module]}` and `{group}`; "
                    "leave it in one"
                )
            groups[module] = group
    return {module: groups.get(module, "rest") for module in present}


@dataclass(frozen=True)
class _Group:
    """Cells that share parameters. `knots` > 1: values are interpolated over depth."""

    name: str
    cells: tuple[Cell, ...]
    models: tuple[str, ...]
    knots: int

    def prefixes(self) -> list[str]:
        if self.knots == 1:
            return [self.name]
        return [f"{self.name}.knot{i}" for i in range(self.knots)]


class BoundSpace:
    """A search space fitted to one family of models; made by `SearchSpace.bind`.

    Attributes:
        parameters: what an optimizer varies, in a fixed order.
    """

    def __init__(
        self,
        space: SearchSpace,
        family: Family,
        modules: Mapping[str, str],
        spans: Sequence[tuple[int, int]],
    ) -> None:
        self.space = space
        self.family = family
        self._groups = tuple(self._make_groups(modules, spans))
        self.parameters: tuple[Parameter, ...] = tuple(self._make_parameters())

    def _make_groups(self, modules: Mapping[str, str], spans: Sequence[tuple[int, int]]) -> Iterator[_Group]:
        smooth = self.space.layers.smooth if isinstance(self.space.layers, Smooth) else 1
        cells_of: dict[str, list[Cell]] = {}
        knots: dict[str, int] = {}
        for cell in self.family.layout.by_cell:
            layer = 0 if cell.layer is None and self.space.outside == "first" else cell.layer
            group = modules[cell.module]
            if layer is None:
                name = "outside" if group == "all" else f"outside.{group}"
            elif len(spans) == 1:
                name, knots[group] = group, smooth
            else:
                first, last = next(span for span in spans if span[0] <= layer < span[1])
                place = f"layers{first}-{last - 1}"
                name = place if group == "all" else f"{place}.{group}"
            cells_of.setdefault(name, []).append(cell)
        for name, cells in cells_of.items():
            live = tuple(m for m, cells_changed in self.family.changes.items() if cells_changed & set(cells))
            if live:
                yield _Group(name, tuple(cells), live, knots.get(name, 1))

    def _make_parameters(self) -> Iterator[Parameter]:
        methods = self.space.methods
        for group in self._groups:
            if len(methods) > 1:
                yield CategoricalParameter(f"{group.name}.method", tuple(methods))
            for prefix in group.prefixes():
                for suffix, bounds in self._suffixes(group):
                    yield FloatParameter(f"{prefix}.{suffix}", bounds.low, bounds.high)

    @cached_property
    def _shared_bounds(self) -> list[tuple[str, Bounds]]:
        return [(key, bounds) for key, bounds in self.space.parameters.items() if key != WEIGHT]

    def _suffixes(self, group: _Group) -> Iterator[tuple[str, Bounds]]:
        """The parameters of a group, or of one of its knots."""
        if WEIGHT in self.space.parameters:
            for model in group.models:
                yield f"{model}.{WEIGHT}", self.space.parameters[WEIGHT]
        yield from self._shared_bounds
        if isinstance(self.space.layers, Lines):
            yield ALPHA, self.space.layers.lines.alpha
            if any(cell.layer is not None for cell in group.cells):
                yield BETA, self.space.layers.lines.beta

    @property
    def dimension(self) -> int:
        """Number of parameters."""
        return len(self.parameters)

    def decode(self, params: Params) -> Recipe:
        """The recipe that `params` stand for, in canonical form: equivalent values give equal digests.

        Raises:
            RecipeError: the values are in bounds but a method refuses their combination.
        """
        cells: dict[Cell, Setting] = {}
        for group in self._groups:
            method = str(params.get(f"{group.name}.method", self.space.methods[0]))
            for cell in group.cells:
                if group.knots > 1 or cell is group.cells[0] or isinstance(self.space.layers, Lines):
                    setting = self._setting(method, group, cell, self._values(group, cell, params))
                cells[cell] = setting
        return self.family.recipe(cells)

    def _values(self, group: _Group, cell: Cell, params: Params) -> dict[str, float]:
        """Values of a cell by suffix (`math.weight`, `density`), interpolated when the group is smooth."""
        suffixes = [suffix for suffix, _ in self._suffixes(group)]
        if group.knots == 1:
            values = {suffix: float(params[f"{group.name}.{suffix}"]) for suffix in suffixes}
            if isinstance(self.space.layers, Lines):
                values[LAMBDA] = values[ALPHA] + values.get(BETA, 0.0) * self._depth(cell)
            return values
        low, high, share = self._between(cell, group.knots)
        return {
            suffix: (1 - share) * float(params[f"{group.name}.knot{low}.{suffix}"])
            + share * float(params[f"{group.name}.knot{high}.{suffix}"])
            for suffix in suffixes
        }

    def _depth(self, cell: Cell) -> float:
        """l / (L - 1) for layer l of L; 0 outside the layers."""
        return 0.0 if cell.layer is None else cell.layer / max(1, self.family.layout.n_layers - 1)

    def _between(self, cell: Cell, knots: int) -> tuple[int, int, float]:
        """Knots around a cell and the share of the upper one; outside the layers: the first knot."""
        position = self._depth(cell) * (knots - 1)
        low = min(int(position), knots - 1)
        return low, min(low + 1, knots - 1), position - low

    def _setting(self, method: str, group: _Group, cell: Cell, values: Mapping[str, float]) -> Setting:
        spec = self.family.specs[method]
        fixed = float(self.space.constants.get(WEIGHT, 1.0))
        weights = {model: rounded(values.get(f"{model}.{WEIGHT}", fixed)) for model in group.models}
        given = {**self.space.constants, **{key: rounded(value) for key, value in values.items()}}
        shared = {key: given[key] for key in given if key in spec.shared}
        if WEIGHT not in spec.per_model and spec.max_models == 2:
            weights, shared["t"] = _heaviest_two(weights, str(cell))
        elif spec.max_models is not None:
            weights = _heaviest(weights, spec.max_models)
        elif WEIGHT not in spec.per_model:  # all models count alike, so a weight only says who takes part
            weights = {model: weight for model, weight in weights.items() if weight > 0.0}
        per_model = {
            model: _within(
                spec,
                {
                    key: weight if key == WEIGHT else given[key]
                    for key in spec.per_model
                    if key == WEIGHT or key in given
                },
            )
            for model, weight in weights.items()
        }
        return Setting(method, shared, per_model)

    def encode(self, recipe: Recipe) -> dict[str, float | str]:
        """Parameters whose recipe is `recipe`, or the nearest the space can say.

        A coarser space's recipe is met exactly as long as its values are inside the bounds; otherwise
        values are clipped, averaged over a group's cells and, for a method that the space has not got,
        read as those of its first method.
        """
        params: dict[str, float | str] = {}
        for group in self._groups:
            settings = {cell: recipe.setting(cell) for cell in group.cells}
            methods = [s.method for s in settings.values() if s.models and s.method in self.space.methods]
            method = max(methods, key=methods.count, default=self.space.methods[0])
            if len(self.space.methods) > 1:
                params[f"{group.name}.method"] = method
            for index, prefix in enumerate(group.prefixes()):
                found = self._read(group, settings, index)
                for suffix, bounds in self._suffixes(group):
                    params[f"{prefix}.{suffix}"] = min(max(found[suffix], bounds.low), bounds.high)
        return {p.name: params[p.name] for p in self.parameters}

    def _read(self, group: _Group, settings: Mapping[Cell, Setting], knot: int) -> dict[str, float]:
        """A group's values in a recipe: the mean over its cells, or over the cells nearest to the knot."""
        cells = list(settings)
        if group.knots > 1:
            cells = self._nearest(cells, knot / (group.knots - 1))
        if isinstance(self.space.layers, Lines):
            result = self._read_lines(group, settings)
        else:
            result = self._read_weights(group, settings, cells)
        for key, bounds in self._shared_bounds:
            found = [v for c in cells if (v := _shared(settings[c], key)) is not None]
            result[key] = _mean(found) if found else self._neutral(key, bounds)
        return result

    def _nearest(self, cells: Sequence[Cell], depth: float) -> list[Cell]:
        """The cells of the layers nearest to a depth in [0, 1]; all of them where none has a layer."""
        target = depth * (self.family.layout.n_layers - 1)
        distance = {c: abs(c.layer - target) for c in cells if c.layer is not None}
        return [c for c in distance if distance[c] == min(distance.values())] or list(cells)

    def _read_weights(
        self, group: _Group, settings: Mapping[Cell, Setting], cells: Sequence[Cell]
    ) -> dict[str, float]:
        result: dict[str, float] = {}
        for model in group.models:
            touched = [c for c in cells if c in self.family.changes[model]] or cells
            result[f"{model}.{WEIGHT}"] = _mean([_weight(settings[c], model) for c in touched])
        return result

    def _read_lines(self, group: _Group, settings: Mapping[Cell, Setting]) -> dict[str, float]:
        """Weights, alpha and beta from both ends, whether depth shows in `lambda` or in the weights."""
        ends = [self._nearest(list(settings), depth) for depth in (0.0, 1.0)]
        weights = [self._read_weights(group, settings, cells) for cells in ends]
        whole = max(weights, key=lambda row: math.fsum(w * w for w in row.values()))
        if WEIGHT not in self.space.parameters:
            whole = dict.fromkeys(whole, float(self.space.constants.get(WEIGHT, 1.0)))
        size = math.fsum(w * w for w in whole.values())
        scales = [
            _mean([v for c in cells if (v := _shared(settings[c], LAMBDA)) is not None] or [1.0])
            * (math.fsum(row[key] * whole[key] for key in whole) / size if size else 1.0)
            for cells, row in zip(ends, weights, strict=True)
        ]
        return {**whole, ALPHA: scales[0], BETA: scales[1] - scales[0]}

    def _neutral(self, key: str, bounds: Bounds) -> float:
        """Value of a parameter that a recipe leaves open: the method's default, or the middle."""
        for name in self.space.methods:
            spec = self.family.specs[name]
            parameter = spec.shared.get(key) or spec.per_model.get(key)
            if parameter is not None and parameter.default is not None:
                return float(parameter.default)
        return (bounds.low + bounds.high) / 2


def _within(spec: MethodSpec, values: Mapping[str, float]) -> dict[str, float]:
    """One model's values, with defaults; what exceeds the limit that the others set is lowered to it."""
    known = {key: values.get(key, p.default) for key, p in spec.per_model.items()}
    whole = {key: value for key, value in known.items() if value is not None}
    return {key: min(value, spec.per_model[key].most(whole)) for key, value in whole.items()}


def _heaviest_two(weights: Mapping[str, float], where: str) -> tuple[dict[str, float], float]:
    """The two models of largest weight, in their order, and the share of the second (slerp's t)."""
    chosen = _heaviest(weights, 2)
    total = sum(chosen.values())
    if len(chosen) < 2 or min(chosen.values()) < 0 or total <= 0:
        raise RecipeError(
            f"{where}: slerp needs two models with weights of at least 0 and a sum above 0, "
            f"but the largest are {weights}; raise `low` of `weight`, or use another method"
        )
    return chosen, rounded(list(chosen.values())[1] / total)


def _heaviest(weights: Mapping[str, float], count: int) -> dict[str, float]:
    """The models of largest weight, in their order."""
    chosen = sorted(weights, key=lambda name: -weights[name])[:count]
    return {name: weights[name] for name in weights if name in chosen}


def _weight(setting: Setting, model: str) -> float:
    values = setting.models.get(model)
    if values is None:
        return 0.0
    if WEIGHT in values:
        return float(values[WEIGHT])
    if setting.method != "slerp":
        return 1.0
    t = float(setting.parameters.get("t", 1.0))
    first = next(iter(setting.models)) == model and len(setting.models) == 2
    return 1 - t if first else t


def _shared(setting: Setting, key: str) -> float | None:
    if key in setting.parameters:
        return float(setting.parameters[key])
    values = [float(v[key]) for v in setting.models.values() if key in v]
    return _mean(values) if values else None


def _mean(values: Sequence[float]) -> float:
    # Equal values keep their exact value, so that a coarse recipe survives the way into a finer space.
    return values[0] if len(set(values)) == 1 else sum(values) / len(values)
