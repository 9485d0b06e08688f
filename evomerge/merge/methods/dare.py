"""DARE: drop random entries of each task vector, rescale the rest, then sum (linear) or elect signs (ties).

The kept entries are a pure function of (seed of the model and tensor, flat index), see `evomerge.merge.mask`.

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
from evomerge.recipe import MethodSpec, Setting

if TYPE_CHECKING:
    from evomerge.sources.streamed import TaskVector


def drop(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> Kept:
    """Each entry kept with probability `density`."""
    from evomerge.merge.mask import Mask, keep_mask

    return Mask(keep_mask(inputs.seeds[index], density, delta.numel(), device=delta.device))


def linear_kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i kept_i."""
    return gta(inputs, sparsify=drop, consensus=False)


def ties_kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i kept_i over the models whose entry has the elected sign."""
    return gta(inputs, sparsify=drop, consensus=True)


def linear_canonical(setting: Setting) -> Setting:
    """`lambda` and the divisor folded into the weights; nothing dropped is task arithmetic."""
    return canonical_sum(LINEAR.complete(setting, LINEAR.name))


def ties_canonical(setting: Setting) -> Setting:
    """Largest weight 1 where only ratios matter; nothing dropped is `ties`, one model is `dare_linear`."""
    return canonical_consensus(TIES.complete(setting, TIES.name), dense="ties", alone="dare_linear")


SHARED = {"lambda": LAMBDA, "normalize": normalize(False), "rescale": rescale(True)}
PER_MODEL = {"weight": WEIGHT, "density": DENSITY}
SOURCE = "Yu 2023, arXiv:2311.03099; rescaled by the L1 norm as mergekit 0.1.5"

LINEAR = MethodSpec(
    name="dare_linear",
    shared=SHARED,
    per_model=PER_MODEL,
    canonical=linear_canonical,
    unchanged_is_absent=True,
    random=True,
    mergekit="dare_linear",
    source=SOURCE,
)
TIES = MethodSpec(
    name="dare_ties",
    shared=SHARED,
    per_model=PER_MODEL,
    canonical=ties_canonical,
    unchanged_is_absent=True,
    random=True,
    mergekit="dare_ties",
    source=SOURCE,
)

METHODS = (Method(LINEAR, linear_kernel, streams=True), Method(TIES, ties_kernel, streams=True))
