"""EMR-merging's unified task vector: elect a sign per entry and keep the largest entry of that sign.

The paper serves one model per task, the unified vector under that task's mask and scale; one set of weights
can hold the unified vector only, so masks and scales are left out and `lambda` scales it.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import LAMBDA, WEIGHT
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.merge.methods._vectors import alone, parts
from evomerge.recipe import BASE_COPY, MethodSpec, Setting, rounded

if TYPE_CHECKING:
    import torch


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda s max_i |w_i delta_i| over the models of sign s, that of sum_i w_i delta_i (- for zero).

    Weights are ours: w_i delta_i in the place of delta_i; the paper has w_i = 1.
    """
    import torch

    rows, scale = parts(inputs), inputs.parameter("lambda")
    scratch = inputs.scratch(len(rows) + 2)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        sign, largest, *terms = scratch[:, : high - low]
        sign.zero_()
        for part, term in zip(rows, terms, strict=True):
            sign.add_(torch.mul(part.delta[low:high], part.weight, out=term))
        sign.copy_(sign > 0.0).mul_(2.0).sub_(1.0)
        largest.zero_()
        for term in terms:
            torch.maximum(largest, term.mul_(sign), out=largest)  # what disagrees is negative now
        out.add_(largest.mul_(sign).mul_(scale))

    return run


def canonical(setting: Setting) -> Setting:
    """Largest weight 1, so that equal weights stay equal and entries that cancel still cancel.

    A negative `lambda` stays where it is: an entry whose sum is zero has the sign - for either weights.
    """
    setting = SPEC.complete(setting, SPEC.name)
    weights = {name: values["weight"] for name, values in setting.models.items()}
    largest = max(map(abs, weights.values()), default=0.0)
    scale = rounded(setting.parameters["lambda"] * largest)
    if scale == 0.0:
        return BASE_COPY
    weights = {name: rounded(weight / largest) for name, weight in weights.items()}
    models = {name: {"weight": weight} for name, weight in weights.items() if weight != 0.0}
    setting = Setting(SPEC.name, {"lambda": scale}, models)
    return alone(setting) if len(models) == 1 else setting


SPEC = MethodSpec(
    name="emr",
    shared={"lambda": LAMBDA},
    per_model={"weight": WEIGHT},
    canonical=canonical,
    unchanged_is_absent=True,
    source="Huang 2024, arXiv:2405.17461, the unified task vector alone",
)

METHODS = (Method(SPEC, kernel),)
