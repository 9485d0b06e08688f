"""Which entries of a task vector are its k largest, exactly, for many k.

`MagnitudeIndex` counts once how many magnitudes share their leading bits (sign dropped, exponent and the
first mantissa bits: classes less than 1 % wide in float32). The k-th largest magnitude then lies in a known
class, so a query collects the few entries of that class in one pass and selects among them.

Exactly k entries are kept; among equal magnitudes those that come first in flat order, or last if asked.

Imports: numpy, torch, `evomerge.merge.compiled`, `evomerge.sources`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from evomerge.merge.compiled import available, members
from evomerge.sources.streamed import TaskVector

BLOCK = 1 << 16  # entries looked at in one step of a query; they stay in the processor's cache
COUNTED = 1 << 20  # entries counted in one step; each step costs one addition per class
CLASS_BITS = 15  # leading bits that name a class: of float32 the exponent and 7 mantissa bits


@dataclass(frozen=True)
class Cut:
    """Keeps |d| > threshold, and |d| == threshold up to flat index `last`, or from the next on.

    Attributes:
        threshold: the k-th largest magnitude.
        last: flat index of the last entry before the choice among those equal to the threshold changes.
        below: the next smaller number of the task vector's dtype (0 for a threshold of 0).
        early: whether entries equal to the threshold are kept up to `last`; false: after it.
    """

    threshold: float
    last: int
    below: float
    early: bool = True

    def write(self, delta: TaskVector, low: int, high: int, out: torch.Tensor) -> None:
        """Put entries [low, high) of the flat `delta` into `out`, zero where they are not kept."""
        middle = min(max(self.last + 1, low), high)
        # hardshrink keeps |d| > limit, so the next smaller limit keeps |d| >= threshold
        first, second = (self.below, self.threshold) if self.early else (self.threshold, self.below)
        for begin, end, limit in ((low, middle, first), (middle, high, second)):
            if begin < end:
                torch.hardshrink(delta[begin:end], limit, out=out[begin - low : end - low])


@dataclass(frozen=True)
class Band:
    """Keeps what `outer` keeps and `inner` does not; None drops nothing from above.

    Attributes:
        outer: keeps the entries of the band and those above it.
        inner: keeps the entries above the band.
    """

    outer: Cut
    inner: Cut | None

    def write(self, delta: TaskVector, low: int, high: int, out: torch.Tensor) -> None:
        """Put entries [low, high) of the flat `delta` into `out`, zero where they are not kept."""
        self.outer.write(delta, low, high, out)
        if self.inner is not None:
            above = torch.empty_like(out)
            self.inner.write(delta, low, high, above)
            out.sub_(above)  # d - d and d - 0 are exact


NOTHING = Cut(math.inf, -1, math.inf)  # keeps no entry


class Chosen(NamedTuple):
    """A `Cut` as numbers on a device: what is larger in magnitude than a limit is kept.

    Attributes:
        first: the limit of the entries before `place`.
        second: the limit of those from `place` on.
        place: flat index, int64.
    """

    first: torch.Tensor
    second: torch.Tensor
    place: torch.Tensor


class MagnitudeIndex:
    """Order statistics of one task vector.

    Args:
        delta: flat, `(n,)`, n >= 1, float32 or float64, finite; it is not kept.
    """

    def __init__(self, delta: TaskVector) -> None:
        self.n = delta.numel()
        integers, shift = _FORMATS[delta.dtype]
        counts = torch.zeros(1 << CLASS_BITS, dtype=torch.int64, device=delta.device)
        found = torch.zeros((), dtype=torch.int64, device=delta.device)  # not fetched block by block
        for begin in range(0, self.n, COUNTED):
            block = delta[begin : begin + COUNTED]
            classes = block.view(integers).bitwise_right_shift(shift).bitwise_and_((1 << CLASS_BITS) - 1)
            counts += torch.bincount(classes, minlength=1 << CLASS_BITS)
            found += block.count_nonzero()
        used = counts.nonzero().flatten()
        self._lowest, highest = int(used[0]), int(used[-1])
        # entries in each used class and in all above it, from the highest class to the lowest
        self._reach = counts[self._lowest : highest + 1].flip(0).cumsum(0).cpu()
        self._zeros = self.n - int(found)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self._reach.nbytes

    def largest(self, delta: TaskVector, k: int, *, early: bool = True) -> Cut:
        """The cut that keeps exactly `k` entries, 1 <= k <= n, of the same `delta` as given before.

        Among equal magnitudes it keeps the first in flat order, or the last where `early` is false.
        """
        if k > self.n - self._zeros:
            wanted = k - (self.n - self._zeros)
            count = wanted if early else self._zeros - wanted
            return _cut(delta, 0.0, _nth_zero(delta, count) if count else -1, early)
        at = int(torch.searchsorted(self._reach, k))
        above = int(self._reach[at - 1]) if at else 0
        missing = k - above
        positions, values = _members(delta, self._lowest + len(self._reach) - 1 - at)
        # the missing-th largest of the class
        value = values.kthvalue(values.numel() + 1 - missing).values
        equal = positions[values == value]
        wanted = missing - int((values > value).sum())
        return _cut(delta, float(value), int(equal[wanted - 1] if early else equal[-wanted] - 1), early)

    def chosen(self, delta: TaskVector, k: int, *, early: bool = True) -> Chosen:
        """The numbers of `largest`, computed on the task vector's device without waiting for it."""
        whole = delta[:]
        if k > self.n - self._zeros:  # it makes no difference which zeros are kept
            zero = whole.new_zeros(())
            return Chosen(zero, zero, zero.new_zeros((), dtype=torch.int64))
        at = int(torch.searchsorted(self._reach, k))
        above = int(self._reach[at - 1]) if at else 0
        missing, count = k - above, int(self._reach[at]) - above
        integers, shift = _FORMATS[delta.dtype]
        number = self._lowest + len(self._reach) - 1 - at
        member = (whole.view(integers) & ((1 << CLASS_BITS) - 1 << shift)) == number << shift
        positions = torch.nonzero_static(member, size=count).flatten()
        values = whole[positions].abs_()
        value = values.kthvalue(count + 1 - missing).values
        equal = (values == value).cumsum(0)
        wanted = missing - (values > value).sum()
        # the flat index of the wanted-th equal entry from the front, or the one before that from the back
        nth = wanted if early else equal[-1] + 1 - wanted
        place = positions[torch.searchsorted(equal, nth.reshape(1))].reshape(()) + (1 if early else 0)
        below = torch.nextafter(value, torch.zeros_like(value))
        return Chosen(below, value, place) if early else Chosen(value, below, place)

    def between(self, delta: TaskVector, above: int, k: int) -> Band:
        """The band that keeps exactly `k` entries below the `above` largest; k >= 1, above + k <= n.

        Among equal magnitudes the last in flat order count as larger, as in a stable ascending sort.
        """
        inner = self.largest(delta, above, early=False) if above else None
        return Band(self.largest(delta, above + k, early=False), inner)


def _cut(delta: TaskVector, threshold: float, last: int, early: bool) -> Cut:
    number, zero = (torch.tensor(x, dtype=delta.dtype) for x in (threshold, 0.0))
    return Cut(threshold, last, float(torch.nextafter(number, zero)), early)


# per dtype: an integer type of its size, and what shifts a magnitude's class to the right end
_FORMATS = {torch.float32: (torch.int32, 31 - CLASS_BITS), torch.float64: (torch.int64, 63 - CLASS_BITS)}


def _members(delta: TaskVector, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and magnitudes of the entries in one class, in flat order."""
    integers, shift = _FORMATS[delta.dtype]
    mask, wanted = ((1 << CLASS_BITS) - 1) << shift, number << shift
    if delta.device.type != "cpu":
        whole = delta[:]
        positions = torch.nonzero((whole.view(integers) & mask) == wanted).flatten()
        return positions, whole[positions].abs_()
    if isinstance(delta, torch.Tensor) and available():
        positions = torch.from_numpy(members(delta.view(integers).numpy(), mask, wanted))
        return positions, delta[positions].abs_()
    found, values = [], []  # torch compares and finds several times slower than numpy
    work = np.empty(BLOCK, np.int32 if integers == torch.int32 else np.int64)
    for begin in range(0, delta.numel(), BLOCK):
        block = delta[begin : begin + BLOCK]
        leading = np.bitwise_and(block.view(integers).numpy(), mask, out=work[: block.numel()])
        places = np.flatnonzero(leading == wanted)
        found.append(places + begin)
        values.append(block.numpy()[places])
    return torch.from_numpy(np.concatenate(found)), torch.from_numpy(np.concatenate(values)).abs_()


def _nth_zero(delta: TaskVector, count: int) -> int:
    """Flat index of the `count`-th zero, from 1."""
    for begin in range(0, delta.numel(), BLOCK):
        places = torch.nonzero(delta[begin : begin + BLOCK] == 0.0).flatten()
        if count <= places.numel():
            return begin + int(places[count - 1])
        count -= places.numel()
    raise AssertionError("the task vector is not the one that was indexed")
