"""TIES: trim each task vector to its largest entries, elect a sign per entry, average those that agree.

As in mergekit the trim is per tensor and the weights take part in the election and in the mean; the paper
trims over the whole model and takes an unweighted mean.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import Kept, sparsified
from evomerge.merge.methods._method import TensorInputs

if TYPE_CHECKING:
    from evomerge.sources.streamed import TaskVector


def kept_of(density: float, n: int) -> int:
    """How many of `n` entries are kept, at least one."""
    return max(1, int(density * n))


def trim(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> Kept:
    """The `kept_of(density, n)` largest magnitudes; among equal ones the first in flat order."""
    from evomerge.merge.magnitude import MagnitudeIndex

    model = inputs.models[index]
    ranks = inputs.once(("magnitudes", model), lambda: MagnitudeIndex(delta))
    return ranks.largest(delta, kept_of(density, delta.numel()))


METHODS = (
    sparsified(
        "ties",
        trim,
        elect=True,
        normalized=True,
        rescaled=False,
        alone="ties",
        source="Yadav 2023, arXiv:2306.01708; per tensor as mergekit 0.1.5",
    ),
)
