"""numba, if it is there, and sharing work out over the cores.

Imports: numpy, torch; numba when `available` is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Array = np.ndarray[Any, Any]

SHARED = 1 << 17  # entries from which work is shared out


@cache
def available() -> bool:
    """Whether numba is installed and works with this Python and numpy."""
    try:
        import evomerge.merge._loops  # noqa: F401
    except ImportError:
        return False
    return True


def members(bits: Array, mask: int, wanted: int) -> Array:
    """Positions, ascending, of the entries with `bits & mask == wanted`; `bits` `(n,)` int32 or int64.

    Call it only where numba is `available`.
    """
    from evomerge.merge import _loops

    kind = bits.dtype.type

    def part(low: int, high: int) -> Array:
        found: Array = _loops.members(bits, kind(mask), kind(wanted), low, high)
        return found

    return np.concatenate(shared_out(part, len(bits)))


def shared_out(part: Callable[[int, int], T], n: int) -> list[T]:
    """`part(low, high)` over [0, n) in as many ranges as torch has threads, in order."""
    count = torch.get_num_threads() if n >= SHARED else 1
    if count == 1:
        return [part(0, n)]
    step = -(-n // count // 64) * 64
    ranges = [(low, min(low + step, n)) for low in range(0, n, step)]
    return list(_pool(count).map(lambda both: part(*both), ranges))


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="merge")
