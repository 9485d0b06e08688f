"""Which entries of a task vector are its k largest, exactly, for many k.

`MagnitudeIndex` counts once how many magnitudes share their leading bits (sign dropped, exponent and the
first mantissa bits: classes less than 1 % wide in float32). The k-th largest magnitude then lies in a known
class. Differences of bfloat16 numbers have few distinct magnitudes, and these are counted once too; where
there are many, a query counts those of one class in a pass. Another pass finds the place of the last one that
is kept, where some of those equal to the threshold are not.

Exactly k entries are kept; among equal magnitudes those that come first in flat order, or last if asked.

Imports: numpy, torch, `evomerge.merge.scans`, `evomerge.sources`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from evomerge.merge import scans
from evomerge.merge.compiled import Array
from evomerge.sources.streamed import TaskVector


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


WORTH = 8  # entries of a class for which the count of one magnitude in each part is remembered
WIDE = 1 << 12  # magnitudes of a class from which it has to be `scans.PARTS` times as many
_NONE = np.zeros((1, 0), np.uint32)
NOTHING = Cut(math.inf, -1, math.inf)  # keeps no entry


class Choice(NamedTuple):
    """A `Cut` before the place is looked for where its choice among equal magnitudes changes.

    Attributes:
        word: of the threshold, see `scans`.
        before: how many of those equal to the threshold stand before that place.
        early: whether these are kept; false: the others.

    Numbers, or `()` int64 tensors on a device that may not have computed them yet.
    """

    word: int | torch.Tensor
    before: int | torch.Tensor
    early: bool


class MagnitudeIndex:
    """Order statistics of one task vector.

    Args:
        delta: flat, `(n,)`, n >= 1, float32 or float64, finite; it is not kept.
    """

    def __init__(self, delta: TaskVector) -> None:
        self.n = delta.numel()
        counts, widths, self._zeros = scans.classes(delta)
        used = np.flatnonzero(counts)
        self._lowest, self._highest = int(used[0]), int(used[-1])
        # entries in each used class and in all above it, from the highest class to the lowest
        self._reach = counts[self._lowest : self._highest + 1][::-1].cumsum()
        worth = np.where(widths > WIDE, WORTH * scans.PARTS, WORTH)
        widths = np.where(widths <= np.maximum(counts // worth, 1), widths, 0) * (counts > 0)
        # the counts of distinct magnitudes in each part, and where those of a used class end
        self._counts = scans.distinct(delta, widths) if widths.any() else _NONE
        self._ends = widths[self._lowest : self._highest + 1].cumsum().astype(np.int32)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(a.nbytes for a in (self._reach, self._counts, self._ends))

    def largest(self, delta: TaskVector, k: int, *, early: bool = True) -> Cut:
        """The cut that keeps exactly `k` entries, 1 <= k <= n, of the same `delta` as given before.

        Among equal magnitudes it keeps the first in flat order, or the last where `early` is false. Zeros
        are the exception: where `k` asks for some of them the cut keeps all, which changes nothing.
        """
        if k > self.n - self._zeros:
            return Cut(0.0, self.n - 1 if early else -1, 0.0, early)
        index = (self._highest, self._reach, self._ends, self._counts)
        word, last = scans.cut(delta, index, k, early) or self._seek(delta, k, early)
        return Cut(scans.magnitude(delta, word), last, scans.magnitude(delta, word - 1), early)

    def _seek(self, delta: TaskVector, k: int, early: bool) -> tuple[int, int]:
        """What `scans.cut` finds, with a look at the entries of a class that was not counted."""
        number, _, rest = self._class_of(k)
        word, counts, wanted = self._known(delta, number, rest) or scans.within(delta, number, rest)
        equal = int(counts.sum())
        before = wanted if early else equal - wanted
        if before in (0, equal):
            return word, self.n - 1 if before else -1
        reach = counts.cumsum()
        at = int(np.searchsorted(reach, before))
        part = scans.parts_of(delta)[at]
        return word, scans.place(delta, word, before - int(reach[at] - counts[at]), part)

    def choice(self, delta: TaskVector, k: int, *, early: bool = True) -> Choice:
        """What `largest` chooses, without waiting for the task vector's device."""
        if k > self.n - self._zeros:
            return Choice(0, 0, early)
        number, size, rest = self._class_of(k)
        known = self._known(delta, number, rest)
        if known is not None:
            word, counts, wanted = known
            return Choice(word, wanted if early else int(counts.sum()) - wanted, early)
        found, equal, which = scans.select(delta, number, size, rest)
        return Choice(found, which if early else equal - which, early)

    def _class_of(self, k: int) -> tuple[int, int, int]:
        """Of the k-th largest entry: its class, how many are in it, which of these it is."""
        at = int(np.searchsorted(self._reach, k))
        above = int(self._reach[at - 1]) if at else 0
        return self._highest - at, int(self._reach[at]) - above, k - above

    def _known(self, delta: TaskVector, number: int, k: int) -> tuple[int, Array, int] | None:
        """What `scans.within` finds; None where it is not remembered."""
        at = number - self._lowest
        begin, end = int(self._ends[at - 1]) if at else 0, int(self._ends[at])
        if begin == end:
            return None
        counts = self._counts[:, begin:end][:, ::-1]
        reach = counts.sum(0).cumsum()
        at = int(np.searchsorted(reach, k))
        step = scans.class_size(delta) // (end - begin)
        word = scans.first_word(delta, number) + step * (end - begin - 1 - at)
        return word, counts[:, at], k - (int(reach[at - 1]) if at else 0)

    def between(self, delta: TaskVector, above: int, k: int) -> Band:
        """The band that keeps exactly `k` entries below the `above` largest; k >= 1, above + k <= n.

        Among equal magnitudes the last in flat order count as larger, as in a stable ascending sort.
        """
        inner = self.largest(delta, above, early=False) if above else None
        return Band(self.largest(delta, above + k, early=False), inner)
