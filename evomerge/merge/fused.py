"""The common methods on a CPU in one pass over memory, compiled by numba.

torch walks every chunk once per operation; here a block of entries goes through the whole merge while it is
in the first-level cache, and the compiled loops let go of Python's lock, so that every core merges a part of
the tensor. The operations, their order and their rounding are those of the torch kernels in
`evomerge.merge.methods`: the results are the same, bit by bit. torch does the work where numba is not
installed, on other devices, and for other dtypes than float32 and bfloat16.

Imports: numpy, torch, `evomerge.merge`; numba when there is something to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from evomerge.merge.compiled import Array, available, shared_out
from evomerge.merge.magnitude import Band, Cut
from evomerge.merge.mask import Mask
from evomerge.merge.methods._gta import GtaKernel, Kept
from evomerge.merge.methods._method import Kernel
from evomerge.merge.methods.linear import LinearKernel

WHOLE = -1.0  # in place of a limit: no cut


def fits(kernel: Kernel, base: torch.Tensor) -> bool:
    """Whether `merge` can do what `kernel` does to this base tensor."""
    if base.device.type != "cpu" or base.dtype not in (torch.float32, torch.bfloat16):
        return False
    if isinstance(kernel, LinearKernel):
        deltas = [delta for delta in kernel.deltas if delta is not None]
    elif isinstance(kernel, GtaKernel):
        if any(not isinstance(term.kept, Cut | Band | Mask | None) for term in kernel.terms):
            return False
        deltas = [term.delta for term in kernel.terms]
    else:
        return False
    return all(isinstance(delta, torch.Tensor) and delta.is_contiguous() for delta in deltas) and available()


def merge(kernel: Kernel, base: torch.Tensor, merged: torch.Tensor) -> bool:
    """Merge the flat tensor `base` into `merged`; whether all results are finite.

    Args:
        kernel: one that `fits`, made for `base`.
        base: `(n,)`, float32 or bfloat16, contiguous.
        merged: like `base`.
    """
    with np.errstate(over="ignore"):  # a factor beyond float32 is infinite, and so are its results
        part = (_linear if isinstance(kernel, LinearKernel) else _gta)(kernel, _words(base), _words(merged))
    return all(shared_out(part, base.numel()))


def _linear(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops

    addresses, factors = _addresses(kernel.deltas), kernel.factors.numpy()
    divisor = np.float32(kernel.divisor)
    return lambda low, high: bool(_loops.average(source, target, addresses, factors, divisor, low, high))


def _gta(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops

    factors = np.array([term.factor for term in kernel.terms], np.float32)
    weights = np.array([term.weight for term in kernel.terms], np.float32)
    cuts = [_cuts(term.kept) for term in kernel.terms]
    limits = np.array([[limit for _, pair in both for limit in pair] for both in cuts], np.float32)
    places = np.array([[place for place, _ in both] for both in cuts], np.int64)
    masks = _addresses([term.kept.keep if isinstance(term.kept, Mask) else None for term in kernel.terms])
    terms = (_addresses([term.delta for term in kernel.terms]), factors, limits, places, masks)
    scale = np.float32(kernel.scale)
    if kernel.elected:
        least = np.float32(min(term.weight for term in kernel.terms))
        return lambda low, high: bool(
            _loops.elect(source, target, terms, weights, kernel.normalized, least, scale, low, high)
        )
    divisor = np.float32(kernel.divisor)
    return lambda low, high: bool(_loops.add(source, target, terms, divisor, scale, low, high))


def _cuts(kept: Kept | None) -> list[tuple[int, tuple[float, float]]]:
    """Of the outer and the inner cut: the place where the limit changes, the limits before and after it."""
    outer = kept.outer if isinstance(kept, Band) else kept
    inner = kept.inner if isinstance(kept, Band) else None
    return [_cut(cut) if isinstance(cut, Cut) else (0, (WHOLE, WHOLE)) for cut in (outer, inner)]


def _cut(cut: Cut) -> tuple[int, tuple[float, float]]:
    limits = (cut.below, cut.threshold) if cut.early else (cut.threshold, cut.below)
    return cut.last + 1, limits


def _words(tensor: torch.Tensor) -> Array:
    """The tensor's memory as numpy sees it: bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    words: Array = tensor.numpy()
    return words


def _addresses(tensors: Sequence[torch.Tensor | None]) -> Array:
    """Where the entries of each begin, 0 for None; the caller keeps the tensors alive."""
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], np.uint64)
