"""Random keep-masks without a generator: entry i is kept when a hash of (seed, i) is below the density.

A mask is a pure function of (seed, flat index of the whole tensor). So the order in which tensors are
merged, chunking, the device and a shard's offset cannot change it, and for one seed the kept sets are nested
in the density: a larger density keeps all that a smaller one keeps.

Imports: torch, `evomerge.sources`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from evomerge.sources.streamed import TaskVector

BLOCK = 32_000  # entries hashed at once: temporaries stay in cache; it cannot change a mask
_WORD = 1 << 32


@dataclass(frozen=True)
class Drawn:
    """Which entries of a task vector are kept: drawn when they are asked for.

    Attributes:
        seed: in [0, 2**32).
        density: of all entries; or `(m,)` float64, one per class.
        classes: `(n,)` int16 or int32, the class of every entry; None with one density.
    """

    seed: int
    density: float | torch.Tensor
    classes: torch.Tensor | None = None

    def write(self, delta: TaskVector, low: int, high: int, out: torch.Tensor) -> None:
        """Put entries [low, high) of the flat `delta` into `out`, zero where they are not kept."""
        if self.classes is None:
            density = float(self.density)
            keep = keep_mask(self.seed, density, high - low, start=low, device=delta.device)
        else:
            densities = torch.as_tensor(self.density)
            keep = keep_mask_by_class(self.seed, densities, self.classes[low:high], start=low)
        torch.mul(delta[low:high], keep, out=out)


@dataclass(frozen=True)
class Mask:
    """The same, drawn once: on accelerators, where drawing costs more than memory, and for `norms`.

    Attributes:
        keep: `(n,)` bool.
    """

    keep: torch.Tensor

    def write(self, delta: TaskVector, low: int, high: int, out: torch.Tensor) -> None:
        """As `Drawn.write`."""
        torch.mul(delta[low:high], self.keep[low:high], out=out)


def keep_mask(
    seed: int,
    density: float,
    n: int,
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
    block: int = BLOCK,
) -> torch.Tensor:
    """Which of the entries [start, start + n) of a flat tensor are kept.

    Args:
        seed: in [0, 2**32); `Recipe.seed_for(model, tensor)`.
        density: probability of an entry to be kept, in (0, 1]; resolved to 2**-32.
        n: number of entries.
        start: flat index of the first entry, for a shard of a larger tensor. Indices repeat after 2**32.
        device: where the mask is made.
        block: entries hashed at once.

    Returns:
        `(n,)` bool.
    """
    keep = torch.ones(n, dtype=torch.bool, device=device)
    limit = threshold(density) - _WORD // 2
    if limit >= _WORD // 2:
        return keep
    for low, x in _hashes(seed, n, start, device, block):
        torch.lt(x, limit, out=keep[low : low + x.numel()])
    return keep


def keep_mask_by_class(
    seed: int, densities: torch.Tensor, classes: torch.Tensor, *, start: int = 0, block: int = BLOCK
) -> torch.Tensor:
    """`keep_mask` where each entry has the density of its class.

    Args:
        seed: in [0, 2**32); `Recipe.seed_for(model, tensor)`.
        densities: `(m,)` float64, in (0, 1), one per class; resolved to 2**-32.
        classes: `(n,)` integers in [0, m), the class of every entry.
        start: flat index of the first entry, for a shard of a larger tensor.
        block: entries hashed at once.

    Returns:
        `(n,)` bool, on the device of `classes`.
    """
    limits = (thresholds(densities) - _WORD // 2).to(classes.device, torch.int32)
    keep = torch.empty(classes.numel(), dtype=torch.bool, device=classes.device)
    for low, x in _hashes(seed, classes.numel(), start, classes.device, block):
        part = slice(low, low + x.numel())
        torch.lt(x, limits.index_select(0, classes[part].int()), out=keep[part])
    return keep


def threshold(density: float) -> int:
    """An entry is kept when its hash, in [0, 2**32), is below this."""
    return round(density * _WORD)


def thresholds(densities: torch.Tensor) -> torch.Tensor:
    """The same for `(m,)` float64 densities, int64."""
    return densities.mul(_WORD).round_().long()


def _hashes(
    seed: int, n: int, start: int, device: torch.device | str, block: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """`(low, hashes of the entries from low on)`, int32, block by block in one buffer."""
    keys = keys_of(seed)
    index = torch.arange(min(block, n), dtype=torch.int32, device=device)
    scratch = torch.empty((2, index.numel()), dtype=torch.int32, device=device)
    for low in range(0, n, block):
        x, shifted = scratch[:, : min(block, n - low)]
        torch.add(index[: x.numel()], _int32(start + low + keys[0]), out=x)
        yield low, _mix(x, shifted, keys[1])


def _mix(x: torch.Tensor, shifted: torch.Tensor, key: int) -> torch.Tensor:
    """Hash `x` in place, int32 with wrap-around; its high bits, which decide a comparison, are well mixed.

    The multipliers are those of lowbias32 (Wellons 2018, "Prospecting for Hash Functions"). Its last
    xor-shift changes only the low 16 bits and is left out; `key` enters between the rounds, so that two
    seeds are not one sequence shifted.
    """
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        torch.bitwise_right_shift(x, shift, out=shifted)  # copies the sign bit: cut it off
        x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
        x.mul_(_int32(multiplier))
        if shift == 16:
            x.bitwise_xor_(_int32(key))
    return x


def keys_of(seed: int) -> tuple[int, int]:
    """Two unrelated 32-bit words of a seed."""
    digest = hashlib.sha256(seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _int32(value: int) -> int:
    """`value` modulo 2**32 as a signed 32-bit integer."""
    return (value + _WORD // 2) % _WORD - _WORD // 2
