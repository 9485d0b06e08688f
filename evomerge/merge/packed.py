"""The terms of a merge as the compiled loops take them: addresses, limits and keys instead of objects.

Imports: numpy, torch, `evomerge.merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from evomerge.merge.compiled import located
from evomerge.merge.magnitude import Band, Cut
from evomerge.merge.mask import Drawn, keys_of, threshold, thresholds

if TYPE_CHECKING:
    from evomerge.merge.methods._gta import Kept, Term

WHOLE = -1.0  # in place of a limit: no cut
NOT_DRAWN, DRAWN, BY_SHORT, BY_INT = range(4)  # as in `_loops`


def known(kept: Kept | None) -> bool:
    """Whether compiled loops can sparsify like this."""
    return isinstance(kept, Cut | Band | Drawn | None)


class Packed:
    """Terms as the loops take them; it keeps what they point to.

    Attributes:
        arrays: per term address, whether raw, factor, limits, places and draws; see `_loops._term`.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._alive: list[object] = [terms]
        addresses, raws = located([term.delta for term in terms])
        factors = np.array([term.factor for term in terms], np.float32)
        cuts = [_cuts(term.kept) for term in terms]
        limits = np.array([[limit for _, pair in both for limit in pair] for both in cuts], np.float32)
        places = np.array([[place for place, _ in both] for both in cuts], np.int64)
        draws = np.array([self._draw(term.kept) for term in terms], np.uint64)
        self.arrays = (addresses, raws, factors, limits, places, draws)

    def _draw(self, kept: Kept | None) -> list[int]:
        if not isinstance(kept, Drawn):
            return [NOT_DRAWN, 0, 0, 0, 0]
        first, second = keys_of(kept.seed)
        if kept.classes is None:
            limit = threshold(float(kept.density))
            # a limit of 2**32 keeps everything and is no 32-bit number
            return [DRAWN if limit < 1 << 32 else NOT_DRAWN, first, second, limit, 0]
        limits = thresholds(torch.as_tensor(kept.density)).to(torch.uint32)
        self._alive.append(limits)
        kind = {torch.int16: BY_SHORT, torch.int32: BY_INT}[kept.classes.dtype]
        return [kind, first, second, kept.classes.data_ptr(), limits.data_ptr()]


def _cuts(kept: Kept | None) -> list[tuple[int, tuple[float, float]]]:
    """Of the outer and the inner cut: the place where the limit changes, the limits before and after it."""
    outer = kept.outer if isinstance(kept, Band) else kept
    inner = kept.inner if isinstance(kept, Band) else None
    return [_cut(cut) if isinstance(cut, Cut) else (0, (WHOLE, WHOLE)) for cut in (outer, inner)]


def _cut(cut: Cut) -> tuple[int, tuple[float, float]]:
    limits = (cut.below, cut.threshold) if cut.early else (cut.threshold, cut.below)
    return cut.last + 1, limits
