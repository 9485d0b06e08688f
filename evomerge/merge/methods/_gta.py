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
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import BASE_COPY, DECIMALS, MethodSpec, ParameterSpec, Setting, rounded

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


class Kept(Protocol):
    """What a sparsifier keeps of one task vector."""

    def write(self, delta: TaskVector, low: int, high: int, out: torch.Tensor) -> None:
        """Put entries [low, high) of `delta` into `out`, zero where they are not kept."""
        ...


Sparsify = Callable[[TensorInputs, int, "TaskVector", float], Kept]

# default by name of the parameters that a sparsifier has for each model beside `density`
Extra = Mapping[str, float]
NO_EXTRA: Extra = MappingProxyType({})


@dataclass(frozen=True)
class Term:
    """One model's part in a merge: factor * kept(delta).

    Attributes:
        delta: the task vector.
        kept: what of it takes part; None: everything.
        factor: the weight times what rescaling asks for.
        weight: what it counts in the divisor.
        model: its name.
    """

    delta: TaskVector
    kept: Kept | None
    factor: float
    weight: float
    model: str = ""

    def write(self, low: int, high: int, out: torch.Tensor) -> None:
        """Put entries [low, high) into `out`."""
        import torch

        if self.kept is None:
            torch.mul(self.delta[low:high], self.factor, out=out)
        else:
            self.kept.write(self.delta, low, high, out)
            out.mul_(self.factor)


def gta(inputs: TensorInputs, *, sparsify: Sparsify | None, consensus: bool) -> Kernel:
    """The kernel of one method of the family.

    Args:
        inputs: of one tensor; `setting` has `weight` (and `density` with a sparsifier) per model, `lambda`,
            `normalize` (and `rescale`) shared.
        sparsify: `(inputs, index of the model, its task vector, density) -> what survives`; called for
            densities below 1 only. None: all entries are kept.
        consensus: elect a sign per entry, that of the sum (+ for zero), and keep what agrees with it.
    """
    terms = [
        _term(inputs, index, delta, weight, sparsify)
        for index, (delta, weight) in enumerate(zip(inputs.deltas, inputs.values("weight"), strict=True))
        if delta is not None and weight != 0.0
    ]
    if not terms:
        return lambda low, high, out: None
    if sparsify is not None and inputs.parameter("rescale"):
        terms = _rescaled(inputs, terms)
    normalized, scale = bool(inputs.parameter("normalize")), float(inputs.parameter("lambda"))
    elected = consensus and len(terms) > 1
    divisor = divisor_of([term.weight for term in terms], inputs.values("weight"), normalized, consensus)
    scratch = inputs.scratch(len(terms) + 3 if elected else 2)
    return GtaKernel(tuple(terms), elected, normalized, divisor, scale, scratch)


def divisor_of(taking_part: list[float], weights: list[float], normalized: bool, consensus: bool) -> float:
    """What the sum of the terms is divided by; 1 where election divides every entry by its own sum.

    Args:
        taking_part: weights of the terms, one or more.
        weights: of all models, those that have no term too.
        normalized: the parameter `normalize`.
        consensus: as for `gta`.
    """
    if not normalized or (consensus and len(taking_part) > 1):
        return 1.0
    # a single term always agrees with itself: its divisor is its own weight
    total = taking_part[0] if consensus else math.fsum(weights)
    return total if consensus or abs(total) >= SMALLEST_DIVISOR else 1.0


def _term(
    inputs: TensorInputs, index: int, delta: TaskVector, weight: float, sparsify: Sparsify | None
) -> Term:
    density = 1.0 if sparsify is None else inputs.values("density")[index]
    kept = None if sparsify is None or density >= 1.0 else sparsify(inputs, index, delta, density)
    return Term(delta, kept, weight, weight, inputs.models[index])


def _rescaled(inputs: TensorInputs, terms: list[Term]) -> list[Term]:
    """Terms with factors that give what they keep the norm of the whole task vector."""
    from evomerge.merge.norms import l1

    places = [place for place, term in enumerate(terms) if term.kept is not None]
    sparse = [replace(terms[place], factor=1.0) for place in places]
    found = list(terms)
    for place, term, after in zip(places, sparse, l1(sparse), strict=True):
        before = inputs.once(("l1", term.model), lambda t=term: l1([replace(t, kept=None)])[0].norm)  # type: ignore[misc]
        rescaled = before >= SMALLEST_NORM and after.norm >= SMALLEST_NORM
        factor = term.weight * (before / after.norm) if rescaled else term.weight
        found[place] = replace(term, kept=after.kept, factor=factor)
    return found


@dataclass(frozen=True)
class GtaKernel:
    """The elementwise rest of a merge of this family.

    Attributes:
        terms: one or more, in the setting's order.
        elected: whether entries that disagree with the sign of the sum are left out.
        normalized: with `elected`: divide by the sum of the weights that agree.
        divisor: without `elected`: of the sum.
        scale: lambda.
        scratch: `(rows, m)` buffers.
    """

    terms: tuple[Term, ...]
    elected: bool
    normalized: bool
    divisor: float
    scale: float
    scratch: torch.Tensor

    def __call__(self, low: int, high: int, out: torch.Tensor) -> None:
        """See `Kernel`."""
        (self._elect if self.elected else self._sum)(low, high, out)

    def _sum(self, low: int, high: int, out: torch.Tensor) -> None:
        """base + scale * (sum of the terms) / divisor, added from the first model to the last."""
        mix, x = self.scratch[:, : high - low]
        for index, term in enumerate(self.terms):
            term.write(low, high, x if index else mix)
            if index:
                mix.add_(x)
        if self.divisor != 1.0:
            mix.div_(self.divisor)
        self._finish(mix, out)

    def _elect(self, low: int, high: int, out: torch.Tensor) -> None:
        """As `_sum`, over the entries whose sign is that of the sum; Yadav 2023, section 4, steps 2 and 3."""
        import torch

        mix, sign, divisor, *xs = self.scratch[:, : high - low]
        one = torch.ones((), dtype=out.dtype, device=out.device)
        sign.zero_()
        for term, x in zip(self.terms, xs, strict=True):
            term.write(low, high, x)
            sign.add_(x)
        torch.copysign(one, sign, out=sign)  # a sum of +0.0 elects +; -0.0 occurs only where all are zero
        mix.zero_()
        divisor.zero_()
        for term, x in zip(self.terms, xs, strict=True):
            mix.add_(x.mul_(sign).clamp_(min=0.0))  # what disagrees is negative now
            if self.normalized:
                divisor.add_(x.sign_(), alpha=term.weight)
        mix.mul_(sign)
        if self.normalized:
            least = min(term.weight for term in self.terms)
            if least > 0.0:  # a divisor is 0 or at least this; several times faster than a masked fill
                divisor.clamp_(min=least)
            else:
                divisor.masked_fill_(divisor == 0.0, 1.0)
            mix.div_(divisor)
        self._finish(mix, out)

    def _finish(self, mix: torch.Tensor, out: torch.Tensor) -> None:
        if self.scale != 1.0:
            mix.mul_(self.scale)
        out.add_(mix)


def sparsified(
    name: str,
    sparsify: Sparsify,
    *,
    elect: bool,
    normalized: bool,
    rescaled: bool,
    source: str,
    alone: str = "",
    extra: Mapping[str, ParameterSpec] = MappingProxyType({}),
    random: bool = False,
    simplify: Callable[[Setting], Setting] = lambda setting: setting,
) -> Method:
    """A method of the family that keeps a part of each task vector; mergekit has it under the same name.

    Args:
        name: of the method.
        sparsify: what is kept, see `gta`.
        elect: whether signs are elected.
        normalized: default of `normalize`.
        rescaled: default of `rescale`.
        source: see `MethodSpec`.
        alone: with `elect`: the method's name when one model is left.
        extra: the sparsifier's own parameters of a model.
        random: whether the sparsifier draws masks.
        simplify: applied to the family's canonical form, where the sparsifier has simpler ones.
    """
    defaults = {key: float(spec.default) for key, spec in extra.items() if spec.default is not None}

    def canonical(setting: Setting) -> Setting:
        complete = spec.complete(setting, name)
        if elect:
            return simplify(canonical_consensus(complete, dense="ties", alone=alone, extra=defaults))
        return simplify(canonical_sum(complete, defaults))

    spec = MethodSpec(
        name=name,
        shared={"lambda": LAMBDA, "normalize": normalize(normalized), "rescale": rescale(rescaled)},
        per_model={"weight": WEIGHT, "density": DENSITY, **extra},
        canonical=canonical,
        unchanged_is_absent=True,
        random=random,
        mergekit=name,
        source=source,
    )

    def summed(inputs: TensorInputs) -> Kernel:
        """base + lambda sum_i w_i kept_i, with `normalize` divided by the sum of all weights."""
        return gta(inputs, sparsify=sparsify, consensus=False)

    def elected(inputs: TensorInputs) -> Kernel:
        """base + lambda sum_i w_i kept_i over the models whose entry has the elected sign.

        With `normalize` the sum is divided by that of these models' weights.
        """
        return gta(inputs, sparsify=sparsify, consensus=True)

    return Method(spec, elected if elect else summed, streams=True, compiled=True)


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
