"""Fisher merging: every entry is the average of the models, weighted by how much each depends on it.

Imports: `evomerge.recipe`, `evomerge.sources.statistics`; torch inside functions only.
"""

from __future__ import annotations

import math

from evomerge.merge.methods._measured import SHARE, average, canonical_shares, measured, shares
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting
from evomerge.sources.statistics import FISHER

FLOOR = ParameterSpec(
    low=0.0,
    low_open=True,
    default=1e-6,
    doc="the least Fisher information of an entry, relative to the root mean square over the whole models",
)
NORMALIZE = ParameterSpec(
    kind="bool", default=False, doc="divide the Fisher information of each model by its norm over the model"
)


def kernel(inputs: TensorInputs) -> Kernel:
    """sum_i w_i F_i theta_i / sum_i w_i F_i, entry by entry, with F_i = max(F_i, floor * r).

    r is the weighted mean over the models of the root mean square of all entries of their F, so that no
    scale of F asks for another `floor`; the authors' floor is absolute. An entry that no model depends on
    (a token that no text had) is at the floor in all of them, and so the weighted average. With `normalize`
    F_i is first divided by its root mean square over the model, which is its norm up to a factor that all
    models share, and r is 1.

    A tensor without statistics, and a model whose F is all zero, make a plain weighted average.
    Memory while a tensor is merged: N more times the tensor.

    Raises:
        RecipeError: all weights are 0.
    """
    import torch

    weights = shares(inputs)
    rows = measured(inputs, FISHER, weights)
    sizes = [inputs.statistics.rms(row.place, FISHER) for row in rows or ()]
    if rows is None or not all(sizes):
        return average(inputs, weights)
    normalized = inputs.parameter("normalize")
    mean = math.fsum(row.share * size for row, size in zip(rows, sizes, strict=True))
    floor = inputs.parameter("floor") * (1.0 if normalized else mean)
    divisors = sizes if normalized else [1.0] * len(sizes)
    scratch = inputs.scratch(3)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        factor, total, mix = scratch[:, : high - low]
        total.zero_()
        mix.zero_()
        for row, divisor in zip(rows, divisors, strict=True):
            torch.div(row.statistics.reshape(-1)[low:high], divisor, out=factor)
            total.add_(factor.clamp_(min=floor).mul_(row.share))
            if row.delta is not None:
                mix.addcmul_(factor, row.delta[low:high])
        out.add_(mix.div_(total))  # theta_i = base + delta_i: the base has all of the weight

    return run


def canonical(setting: Setting) -> Setting:
    """Weights that sum to 1; one model alone is copied."""
    return canonical_shares(SPEC.complete(setting, SPEC.name))


SPEC = MethodSpec(
    name="fisher",
    shared={"floor": FLOOR, "normalize": NORMALIZE},
    per_model={"weight": SHARE},
    canonical=canonical,
    min_models=1,
    needs=FISHER,
    source="Matena 2022, arXiv:2111.09832; a floor for all models, relative",
)

METHODS = (Method(SPEC, kernel),)
