"""TIES: trim each task vector to its largest entries, elect a sign per entry, average those that agree.

As in mergekit the trim is per tensor and the weights take part in the election and in the mean; the paper
trims over the whole model and takes an unweighted mean.

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
    gta,
    normalize,
    rescale,
)
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, Setting

if TYPE_CHECKING:
    from evomerge.sources.streamed import TaskVector


def trim(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> Kept:
    """The `max(1, int(density * n))` largest magnitudes; among equal ones the first in flat order."""
    from evomerge.merge.magnitude import MagnitudeIndex

    model = inputs.models[index]
    ranks = inputs.once(("magnitudes", model), lambda: MagnitudeIndex(delta))
    return ranks.largest(delta, max(1, int(density * delta.numel())))


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i kept_i / sum_i w_i over the models whose entry has the elected sign."""
    return gta(inputs, sparsify=trim, consensus=True)


def canonical(setting: Setting) -> Setting:
    """Largest weight 1 where only ratios matter; one model alone has weight 1."""
    return canonical_consensus(SPEC.complete(setting, SPEC.name), dense="ties", alone="ties")


SPEC = MethodSpec(
    name="ties",
    shared={"lambda": LAMBDA, "normalize": normalize(True), "rescale": rescale(False)},
    per_model={"weight": WEIGHT, "density": DENSITY},
    canonical=canonical,
    unchanged_is_absent=True,
    mergekit="ties",
    source="Yadav 2023, arXiv:2306.01708; per tensor as mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, streams=True),)
