"""Task vectors whose float32 entries are made when they are asked for: read from files, or subtracted.

Imports: `evomerge.sources.checkpoint`; torch only when entries are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from evomerge.sources.checkpoint import TensorFiles

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 20  # entries compared at once


class TaskVector(Protocol):
    """Entries of a flat task vector by slices without step: a tensor, a `RawDelta` or a `StreamedDelta`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        ...

    @property
    def device(self) -> torch.device:
        """Where slices are."""
        ...

    def numel(self) -> int:
        """Number of entries."""
        ...

    def __getitem__(self, part: slice, /) -> torch.Tensor:
        """Entries of a slice, `(m,)`."""
        ...


@dataclass(frozen=True)
class RawDelta:
    """float32(source) - float32(base) of two tensors in memory.

    It takes half the memory of the differences, and the compiled loops and a GPU's kernels read no more.

    Attributes:
        source: the model's own entries, `(n,)` bfloat16 or float16, contiguous.
        base: the base's, alike and on the same device.
    """

    source: torch.Tensor
    base: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries, float32."""
        import torch

        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.source.device

    def numel(self) -> int:
        """Number of entries."""
        return self.source.numel()

    def __getitem__(self, part: slice) -> torch.Tensor:
        """A new float32 tensor with the entries of a slice without step."""
        return self.source[part].float().sub_(self.base[part])


def from_held(held: torch.Tensor, base: torch.Tensor) -> TaskVector:
    """The task vector that `SourceSet.held` gave: flat, with the flat `base` beside it on its device."""
    import torch

    return held if held.dtype == torch.float32 else RawDelta(held, base)


class StreamedDelta:
    """float32(model) - float32(base) of one tensor, by slices.

    Args:
        files: the model's.
        key: the tensor's name in them.
        base: the base's tensor, flat.
    """

    def __init__(self, files: TensorFiles, key: str, base: torch.Tensor) -> None:
        import torch

        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._files, self._key, self._base = files, key, base

    def numel(self) -> int:
        """Number of entries."""
        return self._base.numel()

    def __getitem__(self, part: slice) -> torch.Tensor:
        """A new float32 tensor with the entries of a slice without step."""
        low, high, _ = part.indices(self.numel())
        return self._files.read_range(self._key, low, high).float().sub_(self._base[low:high])

    def any(self) -> bool:
        """Whether an entry differs from zero; as a rule the first block tells."""
        return any(bool(self[low : low + BLOCK].any()) for low in range(0, self.numel(), BLOCK))


def streamed(files: TensorFiles, key: str, base: torch.Tensor) -> StreamedDelta | None:
    """The `StreamedDelta` of these; None when every entry equals the base's."""
    delta = StreamedDelta(files, key, base)
    return delta if delta.any() else None
