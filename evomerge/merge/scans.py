"""Counting magnitudes of a task vector: by class, within a class, and one magnitude up to a place.

The word of a magnitude is its bits, so words are in the order of magnitudes; the leading `CLASS_BITS` bits
after the sign are its class. numba's loops read a task vector as it is held; torch does the same work on
accelerators, for float64, for task vectors that are read from files, and without numba.

Imports: numpy, torch, `evomerge.merge`, `evomerge.sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from evomerge.merge.compiled import Array, base_of, located, readable
from evomerge.merge.workers import ranges, shared_out
from evomerge.sources.streamed import TaskVector

CLASS_BITS = 15  # leading bits that name a class: of float32 the exponent and 7 mantissa bits
PARTS = 8  # of a task vector, in which magnitudes are counted apart: a place is looked for in one of them
COUNTED = 1 << 20  # entries that torch looks at in one step; each step costs one addition per class
DEVICE_COUNTED = 1 << 26  # on an accelerator, where each step costs a launch


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


def _words(delta: TaskVector) -> Iterator[tuple[int, torch.Tensor]]:
    """`(low, words of the entries from low on)` in torch's steps."""
    step = COUNTED if delta.device.type == "cpu" else DEVICE_COUNTED
    for low in range(0, delta.numel(), step):
        yield low, _FORMATS[delta.dtype].of(delta[low : low + step])


def remembered(delta: TaskVector) -> bool:
    """Whether to count distinct magnitudes: on a CPU torch takes longer for that than for many queries."""
    return readable(delta) or delta.device.type != "cpu"


def classes(delta: TaskVector) -> tuple[Array, Array, int]:
    """Per class the number of entries and its width: 0 if unknown, see `distinct`; and the number of zeros.

    The words of a class of known width w are its first word and the next w - 1 at equal distances.

    Returns:
        `(2**CLASS_BITS,)` int64 twice, and the number of zeros.
    """
    if readable(delta):
        from evomerge.merge._counts import classes as loop

        counts, bits, zeros = zip(*_shared(loop, delta), strict=True)
        used = np.bitwise_or.reduce(bits).astype(np.int64)
        lowest = np.where(used == 0, 1 << 16, used & -used)  # the lowest bit below the class that is ever set
        return sum(counts), (1 << 16) // lowest, sum(zeros)
    low_bits = _FORMATS[delta.dtype].low_bits
    total = torch.zeros(1 << CLASS_BITS, dtype=torch.int64, device=delta.device)
    least, none = torch.full_like(total, 1 << low_bits), torch.zeros_like(total[0])
    for _, block in _words(delta):
        number = block >> low_bits
        total += torch.bincount(number, minlength=1 << CLASS_BITS)
        none += (block == 0).sum()
        if remembered(delta):
            bit = (block & -block).long()
            least.scatter_reduce_(0, number.long(), bit.masked_fill_(bit == 0, 1 << low_bits), "amin")
    widths = (1 << low_bits) // least.cpu().numpy() * remembered(delta)
    return total.cpu().numpy(), widths, int(none)


def parts_of(delta: TaskVector) -> list[tuple[int, int]]:
    """The ranges of entries in which `distinct` and `within` count apart."""
    return ranges(delta.numel(), PARTS) if readable(delta) else [(0, delta.numel())]


def distinct(delta: TaskVector, widths: Array) -> Array:
    """How often each magnitude occurs of the classes whose width is not 0, class after class.

    Args:
        delta: one that is `remembered`.
        widths: as from `classes`, or 0 for a class that is not wanted.

    Returns:
        `(parts, sum of the widths)` uint32, for each of `parts_of`.
    """
    low_bits = _FORMATS[delta.dtype].low_bits
    ends = widths.cumsum()
    places, size = np.where(widths > 0, ends - widths, -1), int(ends[-1])
    shifts = (low_bits - np.log2(np.maximum(widths, 1))).astype(np.uint32)
    if readable(delta):
        from evomerge.merge._counts import distinct as loop

        return np.stack(_shared(loop, delta, places, shifts, size, count=PARTS))
    total = torch.zeros(size + 1, dtype=torch.int64, device=delta.device)  # the last one: not wanted
    first, shift = (torch.from_numpy(x).to(delta.device, torch.int64) for x in (places, shifts))
    one = total.new_ones(())
    for _, block in _words(delta):
        number = (block >> low_bits).long()
        place = first[number]
        inside = (block & (1 << low_bits) - 1) >> shift[number]
        place = torch.where(place < 0, size, place + inside)
        total.scatter_add_(0, place, one.expand_as(place))
    return total[None, :-1].cpu().numpy().astype(np.uint32)


def within(delta: TaskVector, number: int, k: int) -> tuple[int, Array, int]:
    """Of the k-th largest entry in a class.

    Returns:
        Its word, how often that occurs in each of `parts_of`, and which of these it is.
    """
    if readable(delta):
        from evomerge.merge._counts import members

        found = _shared(members, delta, np.uint32(number), count=PARTS)
    else:
        low_bits = _FORMATS[delta.dtype].low_bits
        blocks = [block[block >> low_bits == number] for _, block in _words(delta)]
        found = [(torch.cat(blocks) - first_word(delta, number)).cpu().numpy()]
    entries = np.sort(np.concatenate(found))
    low = entries[-k]
    above = len(entries) - int(np.searchsorted(entries, low, "right"))
    counts = np.array([np.count_nonzero(part == low) for part in found])
    return first_word(delta, number) + int(low), counts, k - above


def select(delta: TaskVector, number: int, size: int, k: int) -> tuple[torch.Tensor, ...]:
    """Of the k-th largest entry in a class of `size` entries, on its device and without waiting for it.

    Returns:
        Its word, how often that occurs, and which of these it is: `()` int64.
    """
    form, entries = _FORMATS[delta.dtype], delta[:]
    places = torch.nonzero_static(form.of(entries) >> form.low_bits == number, size=size).flatten()
    values = entries[places].abs_()
    value = values.kthvalue(size + 1 - k).values
    above = (values > value).sum()
    return value.view(form.integers).long(), (values >= value).sum() - above, k - above


def place(delta: TaskVector, word: int, count: int, part: tuple[int, int]) -> int:
    """Flat index of the `count`-th entry, from 1, that has this word, in one of `parts_of`."""
    if readable(delta):
        from evomerge.merge._counts import nth

        ((address,), (raw,)) = located([delta])
        return int(nth(address, raw, base_of(delta), np.uint32(word), count, *part))
    for low, block in _words(delta):
        equal = block.eq(word)
        some = int(equal.sum())
        if count <= some:
            return low + int(torch.nonzero(equal)[count - 1])
        count -= some
    raise AssertionError("the task vector is not the one that was indexed")


def cut(delta: TaskVector, index: tuple[Any, ...], k: int, early: bool) -> tuple[int, int] | None:
    """Word and place of the cut that keeps k entries; None where `_counts.cut` does not know it."""
    if not readable(delta):
        return None
    from evomerge.merge._counts import cut as loop

    ((address,), (raw,)) = located([delta])
    parts = tuple(low for low, _ in parts_of(delta))
    word, last = loop(address, raw, base_of(delta), index, np.array([*parts, delta.numel()]), k, early)
    return None if word < 0 else (int(word), int(last))


def _shared(
    loop: Callable[..., Any], delta: TaskVector, *arguments: Any, count: int | None = None
) -> list[Any]:
    """A loop over all entries, in `count` parts or as many as there are threads."""
    ((address,), (raw,)), base = located([delta]), base_of(delta)
    return shared_out(lambda low, high: loop(address, raw, base, *arguments, low, high), delta.numel(), count)
