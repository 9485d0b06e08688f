"""What a search varies: named parameters as a point of the unit cube and a list of category indices.

Every float parameter is one axis of the unit cube, whatever its range; optimizers that work in numbers see
nothing else. The same place checks what the caller hands in: parameters, the start, an optimizer's options.

Imports: numpy, `evomerge.errors` and `search.base`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import ConfigError
from evomerge.search.base import CategoricalParameter, FloatParameter, Parameter, Params, Start, Value

Vector = NDArray[np.float64]

# Two floats of one parameter are the same when they differ by less than this part of its range: far above
# what another processor's arithmetic changes, far below what a search resolves.
SAME = 1e-9


class Axes:
    """The parameters of one search in their declared order.

    Attributes:
        parameters: all of them, as given.
        floats: the axes of the unit cube, `n` of them.
        categoricals: the parameters with named values.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.floats = tuple(p for p in self.parameters if isinstance(p, FloatParameter))
        self.categoricals = tuple(p for p in self.parameters if isinstance(p, CategoricalParameter))
        _check_parameters(self.parameters)

    def unit(self, params: Params) -> Vector:
        """Float64 of shape `(n,)`, in [0, 1] for values inside their bounds."""
        return np.array(
            [(float(params[p.name]) - p.low) / (p.high - p.low) for p in self.floats], dtype=np.float64
        )

    def indices(self, params: Params) -> tuple[int, ...]:
        """Per categorical parameter, the position of its value among the choices."""
        return tuple(p.choices.index(str(params[p.name])) for p in self.categoricals)

    def params(self, unit: Iterable[float], indices: Iterable[int]) -> dict[str, Value]:
        """Named values, inside their bounds whatever rounding did; the inverse of `unit` and `indices`."""
        values: dict[str, Value] = {}
        for p, u in zip(self.floats, unit, strict=True):
            values[p.name] = min(max(p.low + float(u) * (p.high - p.low), p.low), p.high)
        for c, index in zip(self.categoricals, indices, strict=True):
            values[c.name] = c.choices[index]
        return {p.name: values[p.name] for p in self.parameters}

    def problem(self, params: Params) -> str | None:
        """What keeps `params` from being a point of this space, as a clause; None when nothing does."""
        names = {p.name for p in self.parameters}
        if missing := sorted(names - set(params)):
            return f"parameter `{missing[0]}` has no value"
        if extra := sorted(set(params) - names):
            return f"`{extra[0]}` is no parameter of this search{did_you_mean(extra[0], names)}"
        for p in self.floats:
            value = params[p.name]
            if isinstance(value, str) or not p.low <= value <= p.high:
                return f"parameter `{p.name}` is {value!r}, but must be in [{p.low}, {p.high}]"
        for c in self.categoricals:
            if params[c.name] not in c.choices:
                return (
                    f"parameter `{c.name}` is {params[c.name]!r}, but must be one of {', '.join(c.choices)}"
                )
        return None

    def difference(self, one: Params, other: Params) -> str | None:
        """Name of the first parameter in which two points of this space differ by more than rounding."""
        for p in self.floats:
            if abs(float(one[p.name]) - float(other[p.name])) > SAME * (p.high - p.low):
                return p.name
        return next((c.name for c in self.categoricals if one[c.name] != other[c.name]), None)


def _check_parameters(parameters: Sequence[Parameter]) -> None:
    if not parameters:
        raise ConfigError("the search space has no parameters; give it at least one to vary")
    seen: set[str] = set()
    for p in parameters:
        if p.name in seen:
            raise ConfigError(f"parameter `{p.name}` is declared twice; give every parameter its own name")
        seen.add(p.name)
        if isinstance(p, CategoricalParameter):
            if len(set(p.choices)) < 2 or len(set(p.choices)) < len(p.choices):
                raise ConfigError(
                    f"parameter `{p.name}` has the choices {list(p.choices)}, but needs two or more "
                    "different ones; fix its value instead of searching it"
                )
        elif not (math.isfinite(p.low) and math.isfinite(p.high) and p.low < p.high):
            raise ConfigError(
                f"parameter `{p.name}` has the range [{p.low}, {p.high}], but `low` must be below `high` and "
                "both finite; fix its value instead of searching it, or widen the range"
            )


def check_start(axes: Axes, start: Start) -> None:
    """Raise `ConfigError` when the start or a known point is not a point of the space."""
    if clause := axes.problem(start.params):
        raise ConfigError(f"search start: {clause}; change the start or the search space")
    if not 0.0 < start.sigma <= 1.0:
        raise ConfigError(
            f"search start: sigma is {start.sigma}, but is a part of each parameter's range and must be in "
            "(0, 1]; 0.2 is a usual value"
        )
    for position, (params, fitness) in enumerate(start.known):
        if clause := axes.problem(params):
            raise ConfigError(f"known point {position}: {clause}; leave it out or change the search space")
        if not math.isfinite(fitness):
            raise ConfigError(
                f"known point {position}: its fitness is {fitness}; leave out points without a fitness"
            )


def start_is_known(start: Start) -> bool:
    """Whether the start's fitness is among the known ones, so that no proposal needs to be spent on it."""
    return any(dict(params) == dict(start.params) for params, _ in start.known)


def check_options(optimizer: str, options: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raise `ConfigError` at an option that `optimizer` does not have or whose value is no plain one."""
    names = sorted(allowed)
    for key, value in options.items():
        if key not in names:
            rule = f"it has {', '.join(names)}" if names else "it has none"
            raise ConfigError(
                f"optimizer `{optimizer}` has no option `{key}`{did_you_mean(key, names)}; {rule}"
            )
        if value is not None and not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"optimizer `{optimizer}`: option `{key}` is {value!r}; give it a number, a text or a truth "
                "value"
            )


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`, did you mean ...?` when a candidate is near, else nothing."""
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f", did you mean `{near[0]}`?" if near else ""


def component_seed(seed: int, *key: int) -> int:
    """A seed below 2**32 that is a pure function of the run's seed and `key`, one per use."""
    return int(np.random.SeedSequence([seed, *key]).generate_state(1)[0])
