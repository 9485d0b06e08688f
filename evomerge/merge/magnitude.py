"""Which entries of a task vector are its k largest, exactly, for many k.

`MagnitudeIndex` sorts the magnitudes once and keeps every 256th of them (a fence) with two counts. The k-th
largest magnitude then lies at a fence, or strictly between two neighbours, where at most 255 entries are.
So a query costs at most one pass over the task vector, and none where magnitudes repeat across a fence,
which is the rule for deltas of bfloat16 checkpoints.

Exactly k entries are kept; among equal magnitudes those that come first in flat order.

Imports: numpy, torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

STRIDE = 256  # sorted magnitudes per fence
BLOCK = 32_000  # entries looked at in one step of a pass


@dataclass(frozen=True)
class Cut:
    """Keeps |d| > threshold, and |d| == threshold up to flat index `last`.

    Attributes:
        threshold: the k-th largest magnitude.
        last: flat index of the last entry that is kept among those equal to the threshold.
        below: the next smaller number of the task vector's dtype (0 for a threshold of 0).
    """

    threshold: float
    last: int
    below: float

    def write(self, delta: torch.Tensor, low: int, high: int, out: torch.Tensor) -> None:
        """Put entries [low, high) of the flat `delta` into `out`, zero where they are not kept."""
        middle = min(max(self.last + 1, low), high)
        # hardshrink keeps |d| > limit, so the next smaller limit keeps |d| >= threshold
        for begin, end, limit in ((low, middle, self.below), (middle, high, self.threshold)):
            if begin < end:
                torch.hardshrink(delta[begin:end], limit, out=out[begin - low : end - low])


class MagnitudeIndex:
    """Order statistics of one task vector.

    Args:
        delta: flat, `(n,)`, n >= 1, float32 or float64, finite; it is not kept.
    """

    def __init__(self, delta: torch.Tensor) -> None:
        self.n = delta.numel()
        ascending = delta.abs()
        if delta.device.type == "cpu":
            ascending.numpy().sort()  # in place; numpy's vectorised sort is many times faster than torch's
        else:
            ascending = ascending.sort().values
        ranks = torch.arange(0, self.n + STRIDE, STRIDE).clamp(max=self.n - 1)
        fences = ascending[(self.n - 1 - ranks).to(delta.device)]
        self._fences = fences.cpu()
        self._above = self.n - torch.searchsorted(ascending, fences, right=True).cpu()
        self._upto = self.n - torch.searchsorted(ascending, fences).cpu()

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(tensor.nbytes for tensor in (self._fences, self._above, self._upto))

    def largest(self, delta: torch.Tensor, k: int) -> Cut:
        """The cut that keeps exactly `k` entries, 1 <= k <= n, of the same `delta` as given before."""
        fence = (k - 1) // STRIDE
        for at in (fence, fence + 1):
            above, upto = int(self._above[at]), int(self._upto[at])
            if above < k <= upto:
                value = float(self._fences[at])
                last = self.n - 1 if k == upto else _nth(delta, value, k - above)
                return self._cut(delta, value, last)
        low, high = float(self._fences[fence + 1]), float(self._fences[fence])
        found = list(_between(delta, _next(delta, low, math.inf), _next(delta, high, 0.0)))
        positions = torch.cat([place for place, _ in found])
        values = torch.cat([value for _, value in found])
        missing = k - int(self._upto[fence])
        value = float(values.sort(descending=True).values[missing - 1])
        equal = positions[values == value]
        return self._cut(delta, value, int(equal[missing - 1 - int((values > value).sum())]))

    def _cut(self, delta: torch.Tensor, threshold: float, last: int) -> Cut:
        return Cut(threshold, last, _next(delta, threshold, 0.0))


def _next(like: torch.Tensor, value: float, towards: float) -> float:
    """The neighbour of `value` in the dtype of `like`."""
    number, goal = (torch.tensor(x, dtype=like.dtype) for x in (value, towards))
    return float(torch.nextafter(number, goal))


def _between(delta: torch.Tensor, low: float, high: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Positions and magnitudes of the entries with low <= |d| <= high, block by block in flat order."""
    for begin in range(0, delta.numel(), BLOCK):
        block = delta[begin : begin + BLOCK].abs()
        if block.device.type == "cpu":  # torch compares and finds several times slower than numpy here
            array = block.numpy()
            place = torch.from_numpy(np.flatnonzero((array >= low) & (array <= high)))
        else:
            place = torch.nonzero((block >= low) & (block <= high)).flatten()
        if place.numel():
            yield place + begin, block[place]


def _nth(delta: torch.Tensor, value: float, count: int) -> int:
    """Flat index of the `count`-th entry, from 1, whose magnitude is `value`."""
    for places, _ in _between(delta, value, value):
        if count <= places.numel():
            return int(places[count - 1])
        count -= places.numel()
    raise AssertionError("the task vector is not the one that was indexed")
