"""Model breadcrumbs: drop both the smallest entries of each task vector and a few of the largest.

Of n entries min(int(gamma n), n - k) of the largest are outliers and go; the next k = int(density n) stay.
Among equal magnitudes those that come last in flat order count as larger. As in mergekit counts are per
tensor; the authors count per row. Density 1 keeps everything, outliers too.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import Kept, sparsified
from evomerge.merge.methods._method import TensorInputs
from evomerge.recipe import ParameterSpec

if TYPE_CHECKING:
    from evomerge.sources.streamed import TaskVector

GAMMA = ParameterSpec(
    low=0.0, high=1.0, default=0.01, doc="the fraction of the task vector dropped as its largest entries"
)


def counts_of(density: float, gamma: float, n: int) -> tuple[int, int]:
    """How many of `n` entries are dropped as the largest, and how many of the rest are kept, perhaps none."""
    kept = int(density * n)
    return min(int(gamma * n), n - kept), kept


def band(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> Kept:
    """The `int(density * n)` largest magnitudes below the outliers; nothing when that number is 0."""
    from evomerge.merge.magnitude import NOTHING, MagnitudeIndex

    n, model = delta.numel(), inputs.models[index]
    outliers, kept = counts_of(density, inputs.values("gamma")[index], n)
    if kept == 0:
        return NOTHING
    ranks = inputs.once(("magnitudes", model), lambda: MagnitudeIndex(delta))
    return ranks.between(delta, outliers, kept)


SOURCE = "Davari 2023, arXiv:2312.06795; per tensor as mergekit 0.1.5"

LINEAR = sparsified(
    "breadcrumbs",
    band,
    elect=False,
    normalized=False,
    rescaled=False,
    extra={"gamma": GAMMA},
    source=SOURCE,
)
# Without outliers it is not `ties`, which keeps one entry of a tensor where `int(density * n)` is 0.
TIES = sparsified(
    "breadcrumbs_ties",
    band,
    elect=True,
    normalized=False,
    rescaled=False,
    alone="breadcrumbs",
    extra={"gamma": GAMMA},
    source=SOURCE,
)

METHODS = (LINEAR, TIES)
