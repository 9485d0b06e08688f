"""ComPEFT: ternary task vectors, the largest entries replaced by one magnitude with their signs, then summed.

The paper trims over the whole vector of an expert; here, as everywhere, a task vector is that of one tensor.

Imports: `evomerge.recipe`; torch and `evomerge.merge.magnitude` inside functions only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import LAMBDA, WEIGHT
from evomerge.merge.methods._method import CHUNK, Kernel, Method, TensorInputs
from evomerge.merge.methods._vectors import Part, fold_lambda, parts
from evomerge.recipe import DECIMALS, MethodSpec, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

    from evomerge.merge.magnitude import Cut

DENSITY = ParameterSpec(
    low=0.0, high=1.0, low_open=True, default=0.2, doc="the fraction of the task vector kept"
)


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i std(delta_i) sign(kept_i), kept_i the max(1, int(density n)) largest entries.

    std is the population's, of all n entries. lambda w_i is the paper's alpha of expert i; the paper
    compresses one expert and leaves the sum to other methods, here it is plain.
    """
    import torch

    densities = dict(zip(inputs.models, inputs.values("density"), strict=True))
    rows = [
        (part.delta, keep(inputs, part, densities[part.model]), factor(inputs, part))
        for part in parts(inputs)
    ]
    scratch = inputs.scratch(2)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        mix, term = scratch[:, : high - low]
        mix.zero_()
        for delta, cut, size in rows:
            cut.write(delta, low, high, term)
            mix.add_(torch.sign(term, out=term).mul_(size))
        out.add_(mix)

    return run


def keep(inputs: TensorInputs, part: Part, density: float) -> Cut:
    """Which entries are kept; among equal magnitudes the first in flat order."""
    from evomerge.merge.magnitude import MagnitudeIndex

    ranks = inputs.once(("magnitudes", part.model), lambda: MagnitudeIndex(part.delta))
    return ranks.largest(part.delta, max(1, int(density * part.delta.numel())))


def factor(inputs: TensorInputs, part: Part) -> float:
    """lambda w std(delta)."""
    spread = inputs.once(("std", part.model), lambda: deviation(part.delta))
    return float(inputs.parameter("lambda")) * part.weight * spread


def deviation(delta: torch.Tensor) -> float:
    """Population standard deviation, in float64, in blocks that do not depend on the caller's chunk."""
    blocks = [delta[low : low + CHUNK] for low in range(0, delta.numel(), CHUNK)]
    mean = math.fsum(float(block.double().sum()) for block in blocks) / delta.numel()
    squares = math.fsum(float((block.double() - mean).square_().sum()) for block in blocks)
    return math.sqrt(squares / delta.numel())


def canonical(setting: Setting) -> Setting:
    """`lambda` folded into the weights, densities rounded, never to 0."""
    setting = fold_lambda(SPEC.complete(setting, SPEC.name))
    models = {
        name: {"weight": values["weight"], "density": max(rounded(values["density"]), 10.0**-DECIMALS)}
        for name, values in setting.models.items()
    }
    return Setting(setting.method, setting.parameters, models)


SPEC = MethodSpec(
    name="compeft",
    shared={"lambda": LAMBDA},
    per_model={"weight": WEIGHT, "density": DENSITY},
    canonical=canonical,
    unchanged_is_absent=True,
    source="Yadav 2023, arXiv:2311.13171, per tensor; population standard deviation",
)

METHODS = (Method(SPEC, kernel),)
