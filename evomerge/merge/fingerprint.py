"""A cheap checksum of tensors, to see whether an engine holds what the merger made (promise 4).

The checksum reads bit patterns, so it is exact for every dtype and device, and it weighs each element by
its position (modulo a prime), so that swapped elements show. It is no protection against intent.

Imports: torch (inside the functions).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLES = 65_536  # elements read per tensor: all of a small one, evenly strided in a large one
_PRIME = 8191
CHUNK, DEVICE_CHUNK = 1 << 16, 1 << 26  # elements widened at a time by `bit_sum`: on a CPU within its cache


def checksum(tensor: torch.Tensor) -> int:
    """Checksum of up to `SAMPLES` elements of a tensor of any shape, dtype and device."""
    import torch

    from evomerge.merge import compiled

    flat = tensor.detach().reshape(-1)
    stride = max(1, -(-flat.numel() // SAMPLES))
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    if flat.device.type == "cpu" and flat.is_contiguous() and compiled.available():
        from evomerge.merge._counts import placed_sum

        return int(placed_sum(flat.view(kind).numpy(), stride, _PRIME))
    bits = flat[::stride].contiguous().view(kind).to(torch.int64)
    return int((bits * (torch.arange(bits.numel(), device=bits.device) % _PRIME + 1)).sum())


def combine(checksums: Mapping[str, int]) -> str:
    """One hexadecimal fingerprint of many tensors, independent of their order."""
    text = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of the float32 bit patterns of all elements, modulo 2**64.

    It does not depend on the order of the elements, and zeros count nothing: tensors that an engine fuses,
    slices or pads have together the sum of their parts.
    """
    import torch

    from evomerge.merge import compiled, workers

    flat = tensor.detach().reshape(-1)
    shift = 16 if flat.dtype == torch.bfloat16 else 0  # a bfloat16 is the upper half of a float32
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.bfloat16) and compiled.available():
        from evomerge.merge._counts import word_sum

        words = flat.contiguous().view(torch.int16 if shift else torch.int32).numpy()
        sums = workers.shared_out(lambda low, high: int(word_sum(words[low:high])), len(words))
        return wrapped(sum(sums) << shift)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = CHUNK if flat.device.type == "cpu" else DEVICE_CHUNK
    for low in range(0, flat.numel(), step):
        part = flat[low : low + step]
        if shift:  # nothing has to be converted
            total += part.contiguous().view(torch.int16).sum(dtype=torch.int64) << shift
        else:
            total += part.to(torch.float32).contiguous().view(torch.int32).sum(dtype=torch.int64)
    return int(total)


def wrapped(number: int) -> int:
    """The number modulo 2**64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63
