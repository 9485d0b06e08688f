"""The terms of a merge as the compiled loops take them: addresses, limits and keys instead of objects.

Imports: numpy, torch, `evomerge.merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evomerge.merge.compiled import located, words
from evomerge.merge.magnitude import Band, Cut
from evomerge.merge.mask import Drawn, Mask, keys_of, threshold, thresholds

if TYPE_CHECKING:
    from evomerge.merge.methods._gta import Kept, Term

WHOLE = -1.0  # in place of a limit: no cut
NOT_DRAWN, KNOWN, DRAWN, BY_SHORT, BY_INT = range(5)  # as in `_loops`


def known(kept: Kept | None) -> bool:
    """Whether compiled loops can sparsify like this."""
    return isinstance(kept, Cut | Band | Drawn | Mask | None)


def to_draw(kept: Kept | None) -> bool:
    """Whether a mask has to be drawn; one that keeps everything has a limit that is no 32-bit number."""
    return isinstance(kept, Drawn) and (kept.classes is not None or threshold(float(kept.density)) < 1 << 32)


class Packed:
    """Terms as the loops take them; it keeps what they point to.

    Args:
        terms: of one tensor.
        masks: for each of them `(n,)` bool into which its mask is written as it is drawn; None: nowhere.

    Attributes:
        arrays: per term address, whether raw, factor, limits, places and draws; see `_loops._term`.
    """

    def __init__(self, terms: Sequence[Term], masks: Sequence[torch.Tensor | None] = ()) -> None:
        self._alive: list[object] = [terms, masks]
        addresses, raws = located([term.delta for term in terms])
        factors = np.array([term.factor for term in terms], np.float32)
        cuts = [_cuts(term.kept) for term in terms]
        limits = np.array([[limit for _, pair in both for limit in pair] for both in cuts], np.float32)
        places = np.array([[place for place, _ in both] for both in cuts], np.int64)
        draws = [self._draw(term, mask) for term, mask in zip_longest(terms, masks)]
        self.arrays = (addresses, raws, factors, limits, places, np.array(draws, np.uint64))

    def _draw(self, term: Term, mask: torch.Tensor | None) -> list[int]:
        kept = term.kept
        if isinstance(kept, Mask):
            return [KNOWN, 0, 0, 0, 0, kept.keep.data_ptr()]
        if not isinstance(kept, Drawn) or not to_draw(kept):
            return [NOT_DRAWN, 0, 0, 0, 0, 0]
        into = 0 if mask is None else mask.data_ptr()
        first, second = keys_of(kept.seed)
        if kept.classes is None:
            return [DRAWN, first, second, threshold(float(kept.density)), 0, into]
        limits = thresholds(torch.as_tensor(kept.density)).to(torch.uint32)
        self._alive.append(limits)
        kind = {torch.int16: BY_SHORT, torch.int32: BY_INT}[kept.classes.dtype]
        return [kind, first, second, kept.classes.data_ptr(), limits.data_ptr(), into]


def _cuts(kept: Kept | None) -> list[tuple[int, tuple[float, float]]]:
    """Of the outer and the inner cut: the place where the limit changes, the limits before and after it."""
    outer = kept.outer if isinstance(kept, Band) else kept
    inner = kept.inner if isinstance(kept, Band) else None
    return [_cut(cut) if isinstance(cut, Cut) else (0, (WHOLE, WHOLE)) for cut in (outer, inner)]


def _cut(cut: Cut) -> tuple[int, tuple[float, float]]:
    limits = (cut.below, cut.threshold) if cut.early else (cut.threshold, cut.below)
    return cut.last + 1, limits


Pieces = Callable[[int, int], list[tuple[int, int, tuple[Any, ...]]]]


def pieces_of(kepts: Sequence[Kept | None]) -> Pieces | None:
    """What is kept of each term, as `_one_loop` takes it; None where a mask is not drawn or not everywhere.

    Returns:
        of `(low, high)`: `(begin, end, what is kept of each)`, for parts of the range that no cut divides.
    """
    if all(isinstance(kept, Mask) for kept in kepts):
        masks = tuple(words(kept.keep.view(torch.uint8)) for kept in kepts if isinstance(kept, Mask))
        return lambda low, high: [(low, high, masks)]
    if any(isinstance(kept, Mask | Drawn) for kept in kepts):
        return None
    if all(kept is None for kept in kepts):
        return lambda low, high: [(low, high, (None,) * len(kepts))]
    cuts = [_cuts(kept) for kept in kepts]
    banded = any(isinstance(kept, Band) for kept in kepts)

    def pieces(low: int, high: int) -> list[tuple[int, int, tuple[Any, ...]]]:
        places = {place for both in cuts for place, _ in both if low < place < high}
        ends = [low, *sorted(places), high]
        return [(begin, end, tuple(limits(both, begin) for both in cuts)) for begin, end in pairwise(ends)]

    def limits(both: list[tuple[int, tuple[float, float]]], begin: int) -> Any:
        outer, inner = (np.float32(pair[begin >= place]) for place, pair in both)
        return (outer, inner if inner >= 0 else np.float32(np.inf)) if banded else outer

    return pieces
