"""L1 norms of what is kept of task vectors.

Imports: numpy, torch, `evomerge.merge`; numba when there is something to sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from evomerge.merge.compiled import NO_BASE, base_of, readable
from evomerge.merge.mask import Mask
from evomerge.merge.packed import Packed, known, to_draw
from evomerge.merge.workers import BLOCK, shared_out

if TYPE_CHECKING:
    from evomerge.merge.methods._gta import Kept, Term

BLOCKS = 15  # summed in one step on a CPU; torch would share more entries out over its threads
MASK_BYTES = 512 << 20  # of the masks of one tensor; larger ones are drawn again, block by block
DEVICE_BLOCKS = 1 << 13  # on an accelerator, where launching costs more than memory


class Measured(NamedTuple):
    """The L1 norm of a term, and what is kept of it: its mask, where one was drawn and had room."""

    norm: float
    kept: Kept | None


def l1(terms: Sequence[Term]) -> list[Measured]:
    """For each term of a tensor the sum of the magnitudes of its entries.

    Blocks of `BLOCK` entries, the last one filled up with zeros, are halved until one number is left: twice
    in the task vector's dtype, then in float64. The sum of these numbers is rounded once. So its last bit
    depends on neither chunks, threads nor device.
    """
    if terms and all(readable(term.delta) and known(term.kept) for term in terms):
        return _compiled(terms)
    return [Measured(_by_torch(term), term.kept) for term in terms]


def _by_torch(term: Term) -> float:
    n, like = term.delta.numel(), term.delta
    step = BLOCK * (BLOCKS if like.device.type == "cpu" else DEVICE_BLOCKS)
    part = torch.empty(min(step, -(-n // BLOCK) * BLOCK), dtype=like.dtype, device=like.device)
    sums: list[float] = []
    for low in range(0, n, step):
        high = min(low + step, n)
        used = part[: -(-(high - low) // BLOCK) * BLOCK]
        used[high - low :].zero_()
        term.write(low, high, used[: high - low])
        rows = used.abs().view(-1, BLOCK)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
            rows = rows.double() if half <= BLOCK // 4 else rows
        sums += rows[:, 0].tolist()
    return math.fsum(sums)


def _compiled(terms: Sequence[Term]) -> list[Measured]:
    from evomerge.merge import _loops

    n = terms[0].delta.numel()
    room = n * len(terms) <= MASK_BYTES
    masks = [torch.empty(n, dtype=torch.bool) if room and to_draw(term.kept) else None for term in terms]
    packed = Packed(terms, masks)
    base = next(filter(len, (base_of(term.delta) for term in terms)), NO_BASE)
    sums = np.empty((len(terms), -(-n // BLOCK)), np.float64)
    shared_out(lambda low, high: _loops.sizes(base, packed.arrays, sums, low, high), n)
    kepts = [term.kept if mask is None else Mask(mask) for term, mask in zip(terms, masks, strict=True)]
    return [Measured(math.fsum(row), kept) for row, kept in zip(sums.tolist(), kepts, strict=True)]
