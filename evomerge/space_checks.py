"""Do a search space and a family of models fit together? Checked before anything runs.

Imports: `errors`, `layers`, `recipe`, `sources.statistics`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.errors import ConfigError, RecipeError
from evomerge.layers import Lines
from evomerge.recipe import MethodSpec
from evomerge.sources.statistics import lacking

if TYPE_CHECKING:
    from evomerge.space import Family, SearchSpace

WEIGHT, LAMBDA = "weight", "lambda"


def check_space(space: SearchSpace, family: Family, where: str) -> None:
    """Check methods, bounds and constants of a space.

    Raises:
        ConfigError: an unknown method or parameter, bounds outside a method's range, no weight where a
            method needs one, or a model without the statistics that a method needs.
    """
    _check_methods(space, family.specs, where)
    for name in space.methods:
        kind = family.specs[name].needs
        for model in family.models if kind is not None else ():
            if kind not in family.statistics.get(model, ()):
                raise ConfigError(f"{where}: {lacking(name, str(kind), model)}")


def takes_weights(spec: MethodSpec) -> bool:
    """Whether weights matter to a method: as parameters, or to choose the models of one that takes few."""
    return WEIGHT in spec.per_model or spec.max_models is not None


def _check_methods(space: SearchSpace, specs: Mapping[str, MethodSpec], where: str) -> None:
    known: set[str] = {WEIGHT}
    for name in space.methods:
        if name not in specs:
            raise ConfigError(
                f"{where}: `methods` names `{name}`, which is no merge method; known: {', '.join(specs)}"
            )
        spec = specs[name]
        ranges = {**spec.shared, **spec.per_model}
        known |= set(ranges)
        for key, bounds in space.parameters.items():
            if key in ranges:
                for value in (bounds.low, bounds.high):
                    try:
                        ranges[key].check(value, f"{where}: `parameters.{key}`", key)
                    except RecipeError as error:
                        raise ConfigError(f"{error}; change `low`/`high` of `{key}`") from error
    for table in ("parameters", "constants"):
        for key in getattr(space, table):
            if key not in known:
                raise ConfigError(
                    f"{where}: `{table}.{key}` belongs to none of the methods "
                    f"{', '.join(space.methods)}; known: {', '.join(sorted(known))}"
                )
    if isinstance(space.layers, Lines):
        _check_lines(space, specs, where)
    elif WEIGHT not in space.parameters and any(takes_weights(specs[name]) for name in space.methods):
        raise ConfigError(f"{where}: `parameters.weight` is missing; give it `low` and `high`")


def _check_lines(space: SearchSpace, specs: Mapping[str, MethodSpec], where: str) -> None:
    for name in space.methods:
        if LAMBDA not in specs[name].shared:
            raise ConfigError(
                f"{where}: `layers.lines` scales `lambda`, which `{name}` has not; use `layers.smooth`, or "
                f"one of {', '.join(method for method, spec in specs.items() if LAMBDA in spec.shared)}"
            )
    for table in ("parameters", "constants"):
        if LAMBDA in getattr(space, table):
            raise ConfigError(
                f"{where}: `{table}.lambda` and `layers.lines` both set `lambda`; remove `{table}.lambda`"
            )
    weighed = any(takes_weights(specs[name]) for name in space.methods)
    if weighed and WEIGHT not in space.parameters and WEIGHT not in space.constants:
        raise ConfigError(
            f"{where}: weight is missing; give `parameters.weight` `low` and `high`, or set "
            "`constants.weight`, for example to 1.0"
        )
