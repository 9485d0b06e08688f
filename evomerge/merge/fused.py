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

from evomerge.merge.compiled import Array, begun, located, readable, words
from evomerge.merge.methods._gta import GtaKernel
from evomerge.merge.methods._method import Kernel
from evomerge.merge.methods.linear import LinearKernel
from evomerge.merge.packed import Packed, known
from evomerge.sources.streamed import RawDelta

DTYPES = (torch.float32, torch.bfloat16)  # of the base
ONE_LOOP = 8  # sources that one loop reads; of many more the compiler makes no vector instructions
MOST_ELECTED = 20  # terms among which the loops elect signs: each number of them is compiled by itself


def fits(kernel: Kernel, base: torch.Tensor) -> bool:
    """Whether `begin` can do what `kernel` does to this base tensor."""
    if base.device.type != "cpu" or base.dtype not in DTYPES:
        return False
    if isinstance(kernel, LinearKernel):
        deltas = [delta for delta in kernel.deltas if delta is not None]
    elif isinstance(kernel, GtaKernel):
        if not all(known(term.kept) for term in kernel.terms):
            return False
        if kernel.elected and len(kernel.terms) > MOST_ELECTED:
            return False
        deltas = [term.delta for term in kernel.terms]
    else:
        return False
    return all(map(readable, deltas))


def begin(kernel: Kernel, base: torch.Tensor, merged: torch.Tensor) -> Callable[[], bool]:
    """Begin to merge the flat tensor `base` into `merged`; call the result to wait for the end.

    It returns whether all values are finite.

    Args:
        kernel: one that `fits`, made for `base`, from which every `RawDelta` counts.
        base: `(n,)`, float32 or bfloat16, contiguous.
        merged: like `base`.
    """
    with np.errstate(over="ignore"):  # a factor beyond float32 is infinite, and so are its results
        part = (_linear if isinstance(kernel, LinearKernel) else _gta)(kernel, words(base), words(merged))

    def work(low: int, high: int, kernel: Kernel = kernel) -> bool:
        """`part`, which may know task vectors by their addresses alone: the kernel keeps them alive."""
        return part(low, high)

    ended = begun(work, base.numel())
    return lambda: all(ended())


def _linear(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops

    divisor = np.float32(kernel.divisor)
    raw = _raw_sources(kernel.deltas, source)
    if raw is not None:
        factors = tuple(kernel.factors.numpy())
        return lambda low, high: bool(_loops.average_raw(source, target, raw, factors, divisor, low, high))
    located_at, weights = located(kernel.deltas), kernel.factors.numpy()
    return lambda low, high: bool(_loops.average(source, target, *located_at, weights, divisor, low, high))


def _gta(kernel: Any, source: Array, target: Array) -> Callable[[int, int], bool]:
    from evomerge.merge import _loops

    terms, scale, divisor = kernel.terms, np.float32(kernel.scale), np.float32(kernel.divisor)
    raw = _raw_sources([term.delta for term in terms], source)
    if raw is not None and not kernel.elected and all(term.kept is None for term in terms):
        factors = tuple(np.float32(term.factor) for term in terms)
        return lambda low, high: bool(_loops.add_raw(source, target, raw, factors, divisor, scale, low, high))
    packed = Packed(terms)
    if kernel.elected:
        weights = tuple(np.float32(term.weight) for term in terms)
        rest = (weights, kernel.normalized, scale)
        return lambda low, high: bool(_loops.elect(source, target, packed.arrays, *rest, low, high))
    return lambda low, high: bool(_loops.add(source, target, packed.arrays, divisor, scale, low, high))


def _raw_sources(deltas: Sequence[Any], base: Array) -> tuple[Array, ...] | None:
    """The sources' entries, where all are held as such beside a base alike and fit into one loop."""
    if base.dtype != np.uint16 or len(deltas) > ONE_LOOP or not all(isinstance(d, RawDelta) for d in deltas):
        return None
    return tuple(words(delta.source) for delta in deltas)
