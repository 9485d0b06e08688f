"""What the methods that weigh entries by statistics of the models share: the statistics, and plain averages.

A tensor for which a model that takes part has no statistics (a norm has no Gram matrix) is averaged.

Imports: `evomerge.errors`, `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evomerge.errors import RecipeError
from evomerge.merge.methods._method import Kernel, TensorInputs
from evomerge.recipe import ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

# only the ratios of the weights matter; a negative one could make a divisor zero
SHARE = ParameterSpec(low=0.0, doc="the share of the model in the average")


class Measured(NamedTuple):
    """A model that takes part, with its statistics of the tensor; `place` is that in `deltas`."""

    place: int
    share: float
    statistics: torch.Tensor
    delta: TaskVector | None


def measured(inputs: TensorInputs, kind: str, shares: Sequence[float]) -> list[Measured] | None:
    """The models whose share is not 0, in order; None where one of them has no statistics of the tensor."""
    rows = []
    for place, (share, delta) in enumerate(zip(shares, inputs.deltas, strict=True)):
        if share:
            found = inputs.statistics(place, kind)
            if found is None:
                return None
            rows.append(Measured(place, share, found, delta))
    return rows


def shares(inputs: TensorInputs) -> list[float]:
    """Weights divided by their sum.

    Raises:
        RecipeError: they are all zero.
    """
    weights = inputs.values("weight")
    total = math.fsum(weights)
    if not total:
        raise RecipeError(
            f"{inputs.where}: the weights of {inputs.setting.method} are all 0, and an average divides by "
            "their sum; raise one of them"
        )
    return [weight / total for weight in weights]


def average(inputs: TensorInputs, factors: Sequence[float]) -> Kernel:
    """base + sum_i f_i delta_i; the average of the models when the factors sum to 1."""
    terms = [(f, d) for f, d in zip(factors, inputs.deltas, strict=True) if d is not None and f]

    def run(low: int, high: int, out: torch.Tensor) -> None:
        for factor, delta in terms:
            out.add_(delta[low:high], alpha=factor)

    return run


def canonical_shares(setting: Setting) -> Setting:
    """Weights that sum to 1, models of weight 0 left out; one model alone is copied.

    Args:
        setting: complete, of a method whose result is that model when all models but one have weight 0.
    """
    weights = {name: values["weight"] for name, values in setting.models.items()}
    total = math.fsum(weights.values())
    if total and abs(total - 1.0) > 1e-6 * len(weights):
        weights = {name: weight / total for name, weight in weights.items()}
    kept = {name: rounded(weight) for name, weight in weights.items() if rounded(weight)}
    if len(kept) == 1:
        return Setting("linear", {"normalize": True}, {name: {"weight": 1.0} for name in kept})
    if not kept:
        kept = dict.fromkeys(weights, 0.0)
    models = {name: {**setting.models[name], "weight": weight} for name, weight in kept.items()}
    return Setting(setting.method, setting.parameters, models)
