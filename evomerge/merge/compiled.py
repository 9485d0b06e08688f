"""numba, if it is there, and how its loops find entries.

Imports: numpy, torch, `evomerge.sources`; numba when `available` is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from evomerge.sources.streamed import RawDelta, TaskVector

Array = np.ndarray[Any, Any]

NO_BASE = np.zeros(0, np.uint16)  # in place of the base, where task vectors are float32


@cache
def available() -> bool:
    """Whether numba is installed and works with this Python and numpy."""
    try:
        import evomerge.merge._counts
        import evomerge.merge._loops
        import evomerge.merge._one_loop  # noqa: F401
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
