"""The common methods on a CPU in one pass over memory, compiled by numba.

torch walks every chunk once per operation; here a block of entries goes through the whole merge while it is
in the first-level cache, and the compiled loops let go of Python's lock, so that every core merges a part of
the tensor. The operations, their order and their rounding are those of the torch kernels in
`evomerge.merge.methods`: the results are the same, bit by bit. torch does the work where numba is not
installed, on other devices, and for other dtypes than float32 and bfloat16.

Imports: numpy, torch, `evomerge.merge`; numba when there is something to merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from evomerge.merge.compiled import Array, located, readable, shared_out, words
from evomerge.merge.methods._gta import GtaKernel
from evomerge.merge.methods._method import Kernel
from evomerge.merge.methods.linear import LinearKernel
from evomerge.merge.packed import Packed, known

DTYPES = (torch.float32, torch.bfloat16)  # of the base


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
    """Merge the flat tensor `base` into `merged`; whether all results are finite.

    Args:
        kernel: one that `fits`, made for `base`, from which every `RawDelta` counts.
        base: `(n,)`, float32 or bfloat16, contiguous.
        merged: like `base`.
    """
    with np.errstate(over="ignore"):  # a factor beyond float32 is infinite, and so are its results
        part = (_linear if isinstance(kernel, LinearKernel) else _gta)(kernel, words(base), words(merged))
    return all(shared_out(part, base.numel()))


def _linear(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops

    deltas, factors, divisor = located(kernel.deltas), kernel.factors.numpy(), np.float32(kernel.divisor)
    return lambda low, high: bool(_loops.average(source, target, *deltas, factors, divisor, low, high))


def _gta(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops

    packed, scale = Packed(kernel.terms), np.float32(kernel.scale)
    if kernel.elected:
        weights = np.array([term.weight for term in kernel.terms], np.float32)
        rest = (weights, kernel.normalized, weights.min(), scale)
        return lambda low, high: bool(_loops.elect(source, target, packed.arrays, *rest, low, high))
    divisor = np.float32(kernel.divisor)
    return lambda low, high: bool(_loops.add(source, target, packed.arrays, divisor, scale, low, high))
