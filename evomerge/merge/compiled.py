"""numba, if it is there, how its loops find entries, and sharing work out over the cores.

Imports: numpy, torch, `evomerge.sources`; numba when `available` is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

from evomerge.sources.streamed import RawDelta, TaskVector

T = TypeVar("T")
Array = np.ndarray[Any, Any]

SHARED = 1 << 17  # entries from which work is shared out
BLOCK = 2048  # entries that a compiled loop takes through all of its steps at once
NO_BASE = np.zeros(0, np.uint16)  # in place of the base, where task vectors are float32


@cache
def available() -> bool:
    """Whether numba is installed and works with this Python and numpy."""
    try:
        import evomerge.merge._counts
        import evomerge.merge._loops  # noqa: F401
    except ImportError:
        return False
    return True


def readable(delta: TaskVector) -> bool:
    """Whether compiled loops can read this task vector."""
    if isinstance(delta, torch.Tensor):
        found = delta.dtype == torch.float32 and delta.is_contiguous()
    else:
        found = isinstance(delta, RawDelta) and delta.source.dtype == torch.bfloat16
    return found and delta.device.type == "cpu" and available()


def located(deltas: Sequence[TaskVector | None]) -> tuple[Array, Array]:
    """Where the entries of each begin, 0 for None, and whether they are a source's; the caller keeps them."""
    raws = [isinstance(delta, RawDelta) for delta in deltas]
    tensors = [delta.source if isinstance(delta, RawDelta) else delta for delta in deltas]
    addresses = [tensor.data_ptr() if isinstance(tensor, torch.Tensor) else 0 for tensor in tensors]
    return np.array(addresses, np.uint64), np.array(raws, np.bool_)


def base_of(delta: TaskVector) -> Array:
    """The base's entries that a loop subtracts from those of `delta`, none for float32."""
    return words(delta.base) if isinstance(delta, RawDelta) else NO_BASE


def words(tensor: torch.Tensor) -> Array:
    """The tensor's memory as numpy sees it: bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    result: Array = tensor.numpy()
    return result


def ranges(n: int, count: int) -> list[tuple[int, int]]:
    """[0, n) in about `count` ranges of whole blocks; in one where sharing it out does not pay."""
    if n < SHARED:
        return [(0, n)]
    step = -(-n // count // BLOCK) * BLOCK
    return [(low, min(low + step, n)) for low in range(0, n, step)]


def shared_out(part: Callable[[int, int], T], n: int, count: int | None = None) -> list[T]:
    """`part(low, high)` over [0, n) in order, in `count` ranges, by as many threads as torch has.

    While what was `begun` keeps these busy, this thread does it alone: sharing a core costs more.
    """
    threads = torch.get_num_threads()
    first, *rest = ranges(n, count or threads)
    if len(_begun) + 1 >= threads:
        return [part(low, high) for low, high in (first, *rest)]
    others = [_pool(threads).submit(part, low, high) for low, high in rest]
    return [part(*first), *(each.result() for each in others)]


def begun(part: Callable[[int, int], T], n: int) -> Callable[[], list[T]]:
    """As `shared_out`, without waiting where there are several threads: call it for the results."""
    threads = torch.get_num_threads()
    if threads == 1 or n < SHARED:
        found = [part(0, n)]
        return lambda: found
    parts = [_pool(threads).submit(part, low, high) for low, high in ranges(n, threads)]
    _begun.update(parts)
    for each in parts:
        each.add_done_callback(_begun.discard)
    return lambda: [each.result() for each in parts]


_begun: set[Future[Any]] = set()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="merge")
