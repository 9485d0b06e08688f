"""L1 norms of what is kept of task vectors.

Imports: numpy, torch, `evomerge.merge`; numba when there is something to sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from evomerge.merge.compiled import BLOCK, NO_BASE, base_of, readable, shared_out
from evomerge.merge.packed import Packed, known

if TYPE_CHECKING:
    from evomerge.merge.methods._gta import Term

BLOCKS = 15  # summed in one step on a CPU; torch would share more entries out over its threads
DEVICE_BLOCKS = 1 << 13  # on an accelerator, where launching costs more than memory


def l1(terms: Sequence[Term]) -> list[float]:
    """For each term of a tensor the sum of the magnitudes of its entries, in float64.

    Blocks of `BLOCK` entries, the last one filled up with zeros, are halved until one number is left, and
    the sum of these numbers is rounded once. So its last bit depends on neither chunks, threads nor device.
    """
    if terms and all(readable(term.delta) and known(term.kept) for term in terms):
        return [math.fsum(sums) for sums in _compiled(terms)]
    return [_by_torch(term) for term in terms]


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
        rows = used.abs().double().view(-1, BLOCK)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
        sums += rows[:, 0].tolist()
    return math.fsum(sums)


def _compiled(terms: Sequence[Term]) -> list[list[float]]:
    from evomerge.merge import _loops

    n, packed = terms[0].delta.numel(), Packed(terms)
    base = next(filter(len, (base_of(term.delta) for term in terms)), NO_BASE)
    sums = np.empty((len(terms), -(-n // BLOCK)), np.float64)
    shared_out(lambda low, high: _loops.sizes(base, packed.arrays, sums, low, high), n)
    found: list[list[float]] = sums.tolist()
    return found
