"""DELLA: as DARE, but the larger an entry is in its row, the more likely it is kept.

Within a row (along dimension 1; a tensor of one dimension is one row) of m entries the one of rank r, from
0 for the smallest magnitude, is kept with probability

    density - epsilon + 2 epsilon r / (m - 1)

and with `density` where m is 1. Among equal magnitudes later entries have the higher rank. The kept entries
are a pure function of (seed of the model and tensor, flat index, probability), see `evomerge.merge.mask`.

Ranks depend on the source alone and sorting costs many times the merge, so they are remembered: 2 bytes per
entry, half of what the float32 task vector takes, or 4 where rows are longer than 32,768 entries.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import Kept, sparsified
from evomerge.merge.methods._method import TensorInputs
from evomerge.merge.methods.dare import drop
from evomerge.recipe import ParameterSpec, Setting

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

SORTED = 1 << 20  # entries sorted in one step: an order takes 8 bytes per entry


def room(values: Mapping[str, float]) -> float:
    """What epsilon must stay below: min(density, 1 - density), and no limit where nothing is dropped."""
    density = values["density"]
    return min(density, 1.0 - density) if density < 1.0 else math.inf


EPSILON = ParameterSpec(
    low=0.0,
    high=0.5,
    default=0.15,
    doc="half of the difference between the keep probabilities of the largest and the smallest entry",
    below=room,
    below_doc="the smaller of density and 1 - density, so that every probability lies inside (0, 1); "
    "change epsilon or density",
)


def thin(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> Kept:
    """Each entry kept with the probability of its rank; for epsilon 0 DARE's entries, bit by bit."""
    from evomerge.merge.mask import Drawn, Mask, keep_mask_by_class

    epsilon = inputs.values("epsilon")[index]
    if epsilon == 0.0:
        return drop(inputs, index, delta, density)
    ranks = inputs.once(("row ranks", inputs.models[index]), lambda: row_ranks(delta[:], inputs.shape))
    chances = keep_probabilities(density, epsilon, row_length(inputs.shape))
    if delta.device.type == "cpu":
        return Drawn(inputs.seeds[index], chances, ranks)
    return Mask(keep_mask_by_class(inputs.seeds[index], chances, ranks))


def row_length(shape: tuple[int, ...]) -> int:
    """Entries that are ranked against each other."""
    return shape[1] if len(shape) > 1 else math.prod(shape)


def keep_probabilities(density: float, epsilon: float, m: int) -> torch.Tensor:
    """`(m,)` float64: the keep probability by rank in a row of m entries."""
    import torch

    if m == 1:
        return torch.tensor([density], dtype=torch.float64)
    return density - epsilon + 2.0 * epsilon * (torch.arange(m, dtype=torch.float64) / (m - 1))


def row_ranks(delta: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`(n,)` int16 or int32: the rank of each magnitude in its row of the flat `delta` of `shape`."""
    import torch

    m = row_length(shape)
    rows = delta.reshape(shape[0] if len(shape) > 1 else 1, m, -1)
    dtype = torch.int16 if m <= 1 << 15 else torch.int32
    ranks = torch.empty(rows.shape, dtype=dtype, device=delta.device)
    places = torch.arange(m, dtype=dtype, device=delta.device).view(1, m, 1)
    step = max(1, SORTED // rows[0].numel())
    for low in range(0, len(rows), step):
        order = rows[low : low + step].abs().argsort(dim=1, stable=True)
        ranks[low : low + step].scatter_(1, order, places.expand_as(order))
    return ranks.reshape(-1)


def _as_dare(setting: Setting) -> Setting:
    """Without a difference between probabilities the method is DARE."""
    thinned = [values for values in setting.models.values() if values.get("density", 1.0) < 1.0]
    if setting.method not in DARE or any(values["epsilon"] for values in thinned):
        return setting
    models = {
        name: {key: value for key, value in values.items() if key != "epsilon"}
        for name, values in setting.models.items()
    }
    return Setting(DARE[setting.method], setting.parameters, models)


DARE = {"della_linear": "dare_linear", "della": "dare_ties"}
SOURCE = "Deep 2024, arXiv:2406.11617; rescaled by the L1 norm as mergekit 0.1.5"

LINEAR = sparsified(
    "della_linear",
    thin,
    elect=False,
    normalized=False,
    rescaled=True,
    random=True,
    extra={"epsilon": EPSILON},
    simplify=_as_dare,
    source=SOURCE,
)
TIES = sparsified(
    "della",
    thin,
    elect=True,
    normalized=True,
    rescaled=True,
    random=True,
    alone="della_linear",
    extra={"epsilon": EPSILON},
    simplify=_as_dare,
    source=SOURCE,
)

METHODS = (LINEAR, TIES)
