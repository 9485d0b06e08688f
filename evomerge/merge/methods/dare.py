"""DARE: drop random entries of each task vector, rescale the rest, then sum (linear) or elect signs (ties).

The kept entries are a pure function of (seed of the model and tensor, flat index), see `evomerge.merge.mask`.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import Kept, sparsified
from evomerge.merge.methods._method import TensorInputs

if TYPE_CHECKING:
    from evomerge.sources.streamed import TaskVector


def drop(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> Kept:
    """Each entry kept with probability `density`."""
    from evomerge.merge.mask import Drawn, Mask, keep_mask

    seed = inputs.seeds[index]
    if delta.device.type == "cpu":
        return Drawn(seed, density)
    return Mask(keep_mask(seed, density, delta.numel(), device=delta.device))


SOURCE = "Yu 2023, arXiv:2311.03099; rescaled by the L1 norm as mergekit 0.1.5"

LINEAR = sparsified(
    "dare_linear", drop, elect=False, normalized=False, rescaled=True, random=True, source=SOURCE
)
TIES = sparsified(
    "dare_ties",
    drop,
    elect=True,
    normalized=False,
    rescaled=True,
    random=True,
    alone="dare_linear",
    source=SOURCE,
)

METHODS = (LINEAR, TIES)
