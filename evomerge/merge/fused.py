"""The common methods on a CPU in one pass over memory, compiled by numba.

torch walks every chunk once per operation; here a block of entries goes through the whole merge while it is
in the first-level cache, and the compiled loops let go of Python's lock, so that every core merges a part of
the tensor. The operations, their order and their rounding are those of the torch kernels in
`evomerge.merge.methods`: the results are the same, bit by bit. torch does the work where numba is not
installed, on other devices, and for other dtypes than float32 and bfloat16.

Imports: numpy, torch, `evomerge.merge`, `evomerge.sources`; numba when there is something to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from evomerge.merge.compiled import Array, located, readable, words
from evomerge.merge.methods._gta import GtaKernel
from evomerge.merge.methods._method import Kernel
from evomerge.merge.methods.linear import LinearKernel
from evomerge.merge.packed import Packed, known, pieces_of
from evomerge.merge.workers import shared_out
from evomerge.sources.streamed import RawDelta

DTYPES = (torch.float32, torch.bfloat16)  # of the base
ONE_LOOP = 8  # sources that one loop reads; of many more the compiler makes no vector instructions


def fits(kernel: Kernel, base: torch.Tensor) -> bool:
    """Whether `merge` can do what `kernel` does to this base tensor."""
    if base.device.type != "cpu" or base.dtype not in DTYPES:
        return False
    if isinstance(kernel, LinearKernel):
        deltas = [delta for delta in kernel.deltas if delta is not None]
    elif isinstance(kernel, GtaKernel):
        if not all(known(term.kept) for term in kernel.terms):
            return False
        deltas = [term.delta for term in kernel.terms]
    else:
        return False
    return all(map(readable, deltas))


def merge(kernel: Kernel, base: torch.Tensor, merged: torch.Tensor) -> bool:
    """Merge the flat tensor `base` into `merged`; whether all values are finite.

    Args:
        kernel: one that `fits`, made for `base`, from which every `RawDelta` counts.
        base: `(n,)`, float32 or bfloat16, contiguous.
        merged: like `base`.
    """
    with np.errstate(over="ignore"):  # a factor beyond float32 is infinite, and so are its results
        part = (_linear if isinstance(kernel, LinearKernel) else _gta)(kernel, words(base), words(merged))
    return all(shared_out(part, base.numel()))


def _linear(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops, _one_loop

    divisor = np.float32(kernel.divisor)
    few = _few(kernel.deltas, source)
    if few is not None:
        factors = tuple(kernel.factors.numpy())
        return lambda low, high: bool(_one_loop.average(source, target, few, factors, divisor, low, high))
    located_at, weights = located(kernel.deltas), kernel.factors.numpy()
    return lambda low, high: bool(_loops.average(source, target, *located_at, weights, divisor, low, high))


def _gta(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    few = _few([term.delta for term in kernel.terms], source)
    pieces = pieces_of([term.kept for term in kernel.terms])
    scale, divisor = np.float32(kernel.scale), np.float32(kernel.divisor)
    if few is None or pieces is None:
        return _in_blocks(kernel, source, target, scale, divisor)
    from evomerge.merge import _one_loop

    factors = tuple(np.float32(term.factor) for term in kernel.terms)
    loop: Callable[..., bool] = _one_loop.add
    rest: tuple[Any, ...] = (factors, divisor, scale)
    if kernel.elected:
        weights = tuple(np.float32(term.weight) for term in kernel.terms)
        loop, rest = _one_loop.elect, (factors, weights, kernel.normalized, scale)
    return lambda low, high: all(
        [loop(source, target, few, keeps, *rest, begin, end) for begin, end, keeps in pieces(low, high)]
    )


def _in_blocks(
    kernel: Any, source: Array, target: Array, scale: Any, divisor: Any
) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops

    packed = Packed(kernel.terms)
    if not kernel.elected:
        return lambda low, high: bool(_loops.add(source, target, packed.arrays, divisor, scale, low, high))
    weights, normalized = np.array([term.weight for term in kernel.terms], np.float32), kernel.normalized
    return lambda low, high: bool(
        _loops.elect(source, target, packed.arrays, weights, normalized, scale, low, high)
    )


def _few(deltas: Sequence[Any], base: Array) -> tuple[Array, ...] | None:
    """What one loop reads of the task vectors, where they are few and held alike."""
    if len(deltas) > ONE_LOOP:
        return None
    if all(isinstance(delta, torch.Tensor) for delta in deltas):
        return tuple(words(delta) for delta in deltas)
    if base.dtype == np.uint16 and all(isinstance(delta, RawDelta) for delta in deltas):
        return tuple(words(delta.source) for delta in deltas)
    return None
