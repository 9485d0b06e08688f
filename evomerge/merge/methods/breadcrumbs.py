"""Model breadcrumbs: drop both the smallest entries of each task vector and a few of the largest.

Of n entries min(int(gamma n), n - k) of the largest are outliers and go; the next k = int(density n) stay.
Among equal magnitudes those that come last in flat order count as larger. As in mergekit counts are per
tensor; the authors count per row. Density 1 keeps everything, outliers too.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import (
    DENSITY,
    LAMBDA,
    WEIGHT,
    Kept,
    canonical_consensus,
    canonical_sum,
    gta,
    normalize,
    rescale,
)
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting

if TYPE_CHECKING:
    from evomerge.sources.streamed import TaskVector

GAMMA = ParameterSpec(
    low=0.0, high=1.0, default=0.01, doc="the fraction of the task vector dropped as its largest entries"
)
EXTRA = {"gamma": 0.01}


def band(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> Kept:
    """The `int(density * n)` largest magnitudes below the outliers; nothing when that number is 0."""
    from evomerge.merge.magnitude import NOTHING, MagnitudeIndex

    n, model = delta.numel(), inputs.models[index]
    kept = int(density * n)
    if kept == 0:
        return NOTHING
    ranks = inputs.once(("magnitudes", model), lambda: MagnitudeIndex(delta))
    outliers = min(int(inputs.values("gamma")[index] * n), n - kept)
    return ranks.between(delta, outliers, kept)


def linear_kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i kept_i."""
    return gta(inputs, sparsify=band, consensus=False)


def ties_kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i kept_i over the models whose entry has the elected sign."""
    return gta(inputs, sparsify=band, consensus=True)


def linear_canonical(setting: Setting) -> Setting:
    """`lambda` and the divisor folded into the weights; nothing dropped is task arithmetic."""
    return canonical_sum(LINEAR.complete(setting, LINEAR.name), EXTRA)


def ties_canonical(setting: Setting) -> Setting:
    """Largest weight 1 where only ratios matter; nothing dropped is `ties`, one model is `breadcrumbs`.

    Without outliers it is not `ties`, which keeps one entry of a tensor where `int(density * n)` is 0.
    """
    complete = TIES.complete(setting, TIES.name)
    return canonical_consensus(complete, dense="ties", alone="breadcrumbs", extra=EXTRA)


SHARED = {"lambda": LAMBDA, "normalize": normalize(False), "rescale": rescale(False)}
PER_MODEL = {"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA}
SOURCE = "Davari 2023, arXiv:2312.06795; per tensor as mergekit 0.1.5"

LINEAR = MethodSpec(
    name="breadcrumbs",
    shared=SHARED,
    per_model=PER_MODEL,
    canonical=linear_canonical,
    unchanged_is_absent=True,
    mergekit="breadcrumbs",
    source=SOURCE,
)
TIES = MethodSpec(
    name="breadcrumbs_ties",
    shared=SHARED,
    per_model=PER_MODEL,
    canonical=ties_canonical,
    unchanged_is_absent=True,
    mergekit="breadcrumbs_ties",
    source=SOURCE,
)

METHODS = (Method(LINEAR, linear_kernel, streams=True), Method(TIES, ties_kernel, streams=True))
