"""Counting magnitudes of a task vector: by class, within a class, and one magnitude up to a place.

The word of a magnitude is its bits, so words are in the order of magnitudes; the leading `CLASS_BITS` bits
after the sign are its class. numba's loops read a task vector as it is held; torch does the same work on
accelerators, for float64, for task vectors that are read from files, and without numba.

Imports: numpy, torch, `evomerge.merge.compiled`, `evomerge.sources`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from evomerge.merge.compiled import BLOCK, Array, base_of, located, readable, shared_out
from evomerge.sources.streamed import TaskVector

CLASS_BITS = 15  # leading bits that name a class: of float32 the exponent and 7 mantissa bits
COUNTED = 1 << 20  # entries that torch counts in one step; each step costs one addition per class


class _Format(NamedTuple):
    integers: torch.dtype  # of the size of a word
    low_bits: int  # of a word, after its class
    sign: int  # what is left of a word without it

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The words of some entries."""
        return block.view(self.integers) & self.sign


_FORMATS = {
    torch.float32: _Format(torch.int32, 31 - CLASS_BITS, (1 << 31) - 1),
    torch.float64: _Format(torch.int64, 63 - CLASS_BITS, (1 << 63) - 1),
}


def first_word(delta: TaskVector, number: int) -> int:
    """The smallest word of a class."""
    return number << _FORMATS[delta.dtype].low_bits


def class_size(delta: TaskVector) -> int:
    """Number of words in a class, used or not."""
    return 1 << _FORMATS[delta.dtype].low_bits


def magnitude(delta: TaskVector, word: int) -> float:
    """The number with this word; 0 for -1."""
    kind = np.float32 if delta.dtype == torch.float32 else np.float64
    return float(np.array(max(word, 0), np.uint32 if kind is np.float32 else np.uint64).view(kind))


def classes(delta: TaskVector) -> tuple[Array, Array, int]:
    """Per class the number of entries and its width: 0 if unknown, see `distinct`; and the number of zeros.

    The words of a class of known width w are its first word and the next w - 1 at equal distances.

    Returns:
        `(2**CLASS_BITS,)` int64 twice, and the number of zeros.
    """
    if readable(delta):
        from evomerge.merge._loops import classes as loop

        counts, bits, zeros = zip(*_shared(loop, delta), strict=True)
        used = np.bitwise_or.reduce(bits).astype(np.int64)
        lowest = np.where(used == 0, 1 << 16, used & -used)  # the lowest bit below the class that is ever set
        return sum(counts), (1 << 16) // lowest, sum(zeros)
    form = _FORMATS[delta.dtype]
    total = torch.zeros(1 << CLASS_BITS, dtype=torch.int64, device=delta.device)
    none = 0
    for low in range(0, delta.numel(), COUNTED):
        block = delta[low : low + COUNTED]
        total += torch.bincount(form.of(block) >> form.low_bits, minlength=1 << CLASS_BITS)
        none += block.numel() - int(block.count_nonzero())
    return total.cpu().numpy(), np.zeros(1 << CLASS_BITS, np.int64), none


def distinct(delta: TaskVector, widths: Array) -> Array:
    """How often each magnitude occurs of the classes whose width is not 0, class after class.

    Args:
        delta: read by a compiled loop, as widths are known.
        widths: as from `classes`, or 0 for a class that is not wanted.
    """
    from evomerge.merge._loops import distinct as loop

    ends = widths.cumsum()
    places = np.where(widths > 0, ends - widths, -1)
    shifts = (16 - np.log2(np.maximum(widths, 1))).astype(np.uint32)
    found: Array = sum(_shared(loop, delta, places, shifts, int(ends[-1])))
    return found


def within(delta: TaskVector, number: int) -> tuple[Array, Array]:
    """The distinct words in a class, the largest first, and how many entries have each."""
    if readable(delta):
        from evomerge.merge._loops import low_counts as loop

        often = sum(_shared(loop, delta, np.uint32(number)))
        used = np.flatnonzero(often)[::-1]
        return used + first_word(delta, number), often[used]
    form, found = _FORMATS[delta.dtype], []
    for low in range(0, delta.numel(), COUNTED):
        block = form.of(delta[low : low + COUNTED])
        found.append(block[block >> form.low_bits == number])
    words, counts = np.unique(torch.cat(found).cpu().numpy(), return_counts=True)
    return words[::-1], counts[::-1]


def place(delta: TaskVector, word: int, count: int) -> int:
    """Flat index of the `count`-th entry, from 1, that has this word."""
    form = _FORMATS[delta.dtype]
    if readable(delta):
        from evomerge.merge._loops import equal_counts as loop
        from evomerge.merge._loops import nth

        counts = np.empty(-(-delta.numel() // BLOCK), np.int32)
        _shared(loop, delta, np.uint32(word), counts)
        reach = counts.cumsum()
        block = int(np.searchsorted(reach, count))
        ((address,), (raw,)), before = located([delta]), int(reach[block] - counts[block])
        low, high = block * BLOCK, min((block + 1) * BLOCK, delta.numel())
        return int(nth(address, raw, base_of(delta), np.uint32(word), count - before, low, high))
    for low in range(0, delta.numel(), COUNTED):
        some = int((form.of(delta[low : low + COUNTED]) == word).sum())
        if count <= some:
            equal = torch.nonzero(form.of(delta[low : low + COUNTED]) == word)
            return low + int(equal[count - 1])
        count -= some
    raise AssertionError("the task vector is not the one that was indexed")


def _shared(loop: Callable[..., Any], delta: TaskVector, *arguments: Any) -> list[Any]:
    """A loop over all entries, in as many parts as there are threads."""
    ((address,), (raw,)), base = located([delta]), base_of(delta)
    return shared_out(lambda low, high: loop(address, raw, base, *arguments, low, high), delta.numel())
