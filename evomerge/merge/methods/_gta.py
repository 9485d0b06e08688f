"""The core that task arithmetic, TIES, DARE and their relatives share ("generalised task arithmetic").

    base + lambda * normalized(consensus(sum_i weight_i * rescaled(sparsified(delta_i))))

A method chooses a sparsifier (or none) and whether signs are elected; the rest is here, in mergekit's order
of operations, so that float32 results without a sparsifier agree with mergekit to the last bit.

Also here: the parameters of the family and the canonical forms of its settings.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from evomerge.merge.methods._method import CHUNK, Kernel, TensorInputs
from evomerge.recipe import BASE_COPY, DECIMALS, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

SMALLEST_DIVISOR = 1e-8  # without election: a sum of weights below this does not divide (mergekit)
SMALLEST_NORM = 1e-7  # rescaling is skipped when an L1 norm is below this (mergekit)

WEIGHT = ParameterSpec(doc="the coefficient of the model")
LAMBDA = ParameterSpec(default=1.0, doc="the scale of the merged task vector")
DENSITY = ParameterSpec(
    low=0.0, high=1.0, low_open=True, default=1.0, doc="the fraction of the task vector kept"
)


def normalize(default: bool) -> ParameterSpec:
    """The `normalize` parameter with a method's own default."""
    return ParameterSpec(kind="bool", default=default, doc="divide by the sum of the weights that take part")


def rescale(default: bool) -> ParameterSpec:
    """The `rescale` parameter with a method's own default."""
    return ParameterSpec(
        kind="bool", default=default, doc="scale kept entries so that the L1 norm of the task vector is kept"
    )


# `write(low, high, out)` puts entries [low, high) of a task vector into `out`
Write = Callable[[int, int, "torch.Tensor"], None]


Sparsify = Callable[[TensorInputs, int, "TaskVector", float], Write]

# default by name of the parameters that a sparsifier has for each model beside `density`
Extra = Mapping[str, float]
NO_EXTRA: Extra = MappingProxyType({})


@dataclass(frozen=True)
class Term:
    """One model's part in a merge.

    Attributes:
        write: puts weight * rescaled(sparsified(delta)) into its output.
        weight: what it counts in the divisor.
    """

    write: Write
    weight: float


def gta(inputs: TensorInputs, *, sparsify: Sparsify | None, consensus: bool) -> Kernel:
    """The kernel of one method of the family.

    Args:
        inputs: of one tensor; `setting` has `weight` (and `density` with a sparsifier) per model, `lambda`,
            `normalize` (and `rescale`) shared.
        sparsify: `(inputs, index of the model, its task vector, density) -> Write`, what survives, unscaled;
            called for densities below 1 only. None: all entries are kept.
        consensus: elect a sign per entry, that of the sum (+ for zero), and keep what agrees with it.
    """
    terms = [
        _term(inputs, index, delta, weight, sparsify)
        for index, (delta, weight) in enumerate(zip(inputs.deltas, inputs.values("weight"), strict=True))
        if delta is not None and weight != 0.0
    ]
    normalized, scale = inputs.parameter("normalize"), inputs.parameter("lambda")
    if not terms:
        return lambda low, high, out: None
    if consensus and len(terms) > 1:
        return _elected(inputs, terms, normalized, scale)
    # a single term always agrees with itself: its divisor is its own weight
    total = terms[0].weight if consensus else math.fsum(inputs.values("weight"))
    small = not consensus and abs(total) < SMALLEST_DIVISOR
    return _summed(inputs, terms, total if normalized and not small else 1.0, scale)


def _term(
    inputs: TensorInputs, index: int, delta: TaskVector, weight: float, sparsify: Sparsify | None
) -> Term:
    density = 1.0 if sparsify is None else inputs.values("density")[index]
    if sparsify is None or density >= 1.0:
        return Term(_scaled(delta, weight), weight)
    write = sparsify(inputs, index, delta, density)
    factor = weight
    if inputs.parameter("rescale"):
        n = delta.numel()
        before = inputs.once(("l1", inputs.models[index]), lambda: l1(_scaled(delta, 1.0), n, delta))
        after = l1(write, n, delta)
        if before >= SMALLEST_NORM and after >= SMALLEST_NORM:
            factor *= before / after

    def write_scaled(low: int, high: int, out: torch.Tensor) -> None:
        write(low, high, out)
        out.mul_(factor)

    return Term(write_scaled, weight)


def _scaled(delta: TaskVector, factor: float) -> Write:
    import torch

    def write(low: int, high: int, out: torch.Tensor) -> None:
        torch.mul(delta[low:high], factor, out=out)

    return write


def l1(write: Write, n: int, like: TaskVector) -> float:
    """Sum of the magnitudes of the `n` entries that `write` writes, accumulated in float64.

    The blocks do not depend on the caller's chunk, so neither does the last bit of the sum.
    """
    import torch

    total = torch.zeros((), dtype=torch.float64, device=like.device)
    block = torch.empty(min(CHUNK, n), dtype=like.dtype, device=like.device)
    for low in range(0, n, CHUNK):
        part = block[: min(CHUNK, n - low)]
        write(low, low + part.numel(), part)
        total += part.abs_().sum(dtype=torch.float64)
    return float(total)


def _summed(inputs: TensorInputs, terms: list[Term], divisor: float, scale: float) -> Kernel:
    """base + scale * (sum of the terms) / divisor, added from the first model to the last."""
    scratch = inputs.scratch(2)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        mix, x = scratch[:, : high - low]
        for index, term in enumerate(terms):
            term.write(low, high, x if index else mix)
            if index:
                mix.add_(x)
        _finish(mix, divisor, scale, out)

    return run


def _elected(inputs: TensorInputs, terms: list[Term], normalized: bool, scale: float) -> Kernel:
    """As `_summed`, over the entries whose sign is that of the sum; Yadav 2023, section 4, steps 2 and 3."""
    import torch

    scratch = inputs.scratch(len(terms) + 3)
    one = torch.ones((), dtype=inputs.dtype, device=inputs.base.device)
    least = min(term.weight for term in terms)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        mix, sign, divisor, *xs = scratch[:, : high - low]
        sign.zero_()
        for term, x in zip(terms, xs, strict=True):
            term.write(low, high, x)
            sign.add_(x)
        torch.copysign(one, sign, out=sign)  # a sum of +0.0 elects +; -0.0 occurs only where all are zero
        mix.zero_()
        divisor.zero_()
        for term, x in zip(terms, xs, strict=True):
            mix.add_(x.mul_(sign).clamp_(min=0.0))  # what disagrees is negative now
            if normalized:
                divisor.add_(x.sign_(), alpha=term.weight)
        mix.mul_(sign)
        if normalized:
            if least > 0.0:  # a divisor is 0 or at least this; several times faster than a masked fill
                divisor.clamp_(min=least)
            else:
                divisor.masked_fill_(divisor == 0.0, 1.0)
            mix.div_(divisor)
        _finish(mix, 1.0, scale, out)

    return run


def _finish(mix: torch.Tensor, divisor: float, scale: float, out: torch.Tensor) -> None:
    if divisor != 1.0:
        mix.div_(divisor)
    if scale != 1.0:
        mix.mul_(scale)
    out.add_(mix)


def canonical_sum(setting: Setting, extra: Extra = NO_EXTRA) -> Setting:
    """Canonical form without election: the merge is linear in the weights, so all scales go into them.

    `normalize` false, `lambda` 1, no model of weight 0; with every density 1 the method is task arithmetic.
    """
    weights = {name: values["weight"] for name, values in setting.models.items()}
    total = math.fsum(weights.values())
    divisor = total if setting.parameters["normalize"] and abs(total) >= SMALLEST_DIVISOR else 1.0
    factor = setting.parameters["lambda"] / divisor
    kept = {name: rounded(weight * factor) for name, weight in weights.items()}
    kept = {name: weight for name, weight in kept.items() if weight != 0.0}
    if not kept:
        return BASE_COPY
    density = _densities(setting, kept)
    shared: dict[str, float | bool] = {"lambda": 1.0, "normalize": False}
    if all(value == 1.0 for value in density.values()):
        return Setting("task_arithmetic", shared, {name: {"weight": kept[name]} for name in kept})
    shared["rescale"] = setting.parameters["rescale"]
    return Setting(setting.method, shared, _models(setting, kept, density, extra))


def canonical_consensus(setting: Setting, *, dense: str, alone: str, extra: Extra = NO_EXTRA) -> Setting:
    """Canonical form with election.

    Weights are divided by the largest, not by their sum: equal weights become exactly 1, so that entries
    that cancel exactly, which decide an election, still cancel. Without `normalize` the divisor goes into
    `lambda`; with it, only positive weights have a free scale.

    Args:
        setting: complete.
        dense: the method's name when every density is 1.
        alone: its name when one model is left, whose sign wins every election.
        extra: the sparsifier's own parameters of a model.
    """
    scale = setting.parameters["lambda"]
    normalized = setting.parameters["normalize"]
    weights = {name: values["weight"] for name, values in setting.models.items()}
    largest = max(map(abs, weights.values()), default=0.0)
    if largest == 0.0:
        return BASE_COPY
    if not normalized or all(weight >= 0.0 for weight in weights.values()):
        weights = {name: weight / largest for name, weight in weights.items()}
        scale = scale if normalized else scale * largest
    scale = rounded(scale)
    weights = {name: rounded(weight) for name, weight in weights.items()}
    weights = {name: weight for name, weight in weights.items() if weight != 0.0}
    if not weights or scale == 0.0:
        return BASE_COPY
    density = _densities(setting, weights)
    if len(weights) == 1:
        return _canonical_single(setting, weights, density, scale, alone, extra)
    sparse = any(value < 1.0 for value in density.values())
    return Setting(
        setting.method if sparse else dense,
        {
            "lambda": scale,
            "normalize": normalized,
            "rescale": sparse and setting.parameters["rescale"],
        },
        _models(setting, weights, density, extra if sparse else NO_EXTRA),
    )


def _canonical_single(
    setting: Setting,
    weights: Mapping[str, float],
    density: Mapping[str, float],
    scale: float,
    alone: str,
    extra: Extra,
) -> Setting:
    """One model wins every election: only the product of its weight and `lambda` counts."""
    ((name, weight),) = weights.items()
    factor = scale if setting.parameters["normalize"] else rounded(scale * weight)
    if density[name] == 1.0 or alone != "ties":
        summed = Setting(
            alone if density[name] < 1.0 else "task_arithmetic",
            {**setting.parameters, "lambda": 1.0, "normalize": False},
            _models(setting, {name: factor}, density, extra),
        )
        return canonical_sum(summed, extra)
    shared = {"lambda": factor, "normalize": True, "rescale": setting.parameters["rescale"]}
    return Setting("ties", shared, _models(setting, {name: 1.0}, density, extra)) if factor else BASE_COPY


def _densities(setting: Setting, names: Mapping[str, float]) -> dict[str, float]:
    """Rounded densities of the models in `names`, never rounded down to 0."""
    return {name: max(rounded(setting.models[name].get("density", 1.0)), 10.0**-DECIMALS) for name in names}


def _models(
    setting: Setting, weights: Mapping[str, float], density: Mapping[str, float], extra: Extra
) -> dict[str, dict[str, float]]:
    """Values per model; where nothing is dropped the extra parameters have no effect and their defaults."""
    return {
        name: {
            "weight": weight,
            "density": density[name],
            **{
                key: rounded(setting.models[name][key]) if density[name] < 1.0 else default
                for key, default in extra.items()
            },
        }
        for name, weight in weights.items()
    }
