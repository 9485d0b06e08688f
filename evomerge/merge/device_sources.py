"""Source tensors on an accelerator: as stored where that is enough, in pinned host memory what does not fit.

A full checkpoint's tensor in the base's 16-bit dtype is kept as it is (`SourceSet.held`), half the bytes of
its float32 task vector. Copies to the device run on a stream of their own, so that the next tensors arrive
while those before are merged.

Has not run on a GPU yet: checked in Triton's interpreter, where there is one stream and no pinned memory.

Imports: torch, `evomerge.sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch

from evomerge.sources.streamed import TaskVector, from_held

T = TypeVar("T")

ALIGNED = 16  # bytes; the kernels load this much at once


class Cache(Protocol):
    """Values by key, see `merger`."""

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of a key, computed where it is not held."""
        ...


class DeviceSources:
    """Bases and task vectors on a device.

    What `base` and `delta` return may still be under way: call `arrive` before the device reads it.

    Args:
        sources: `TensorSources`.
        device: where tensors go.
        cache: what stays there from one candidate to the next.
        host: what stays in pinned memory of those that find no room in `cache`.
    """

    def __init__(self, sources: Any, device: torch.device, cache: Cache, host: Cache) -> None:
        self._sources, self._device, self._cache, self._host = sources, device, cache, host
        self._copies: Any = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def base(self, name: str) -> torch.Tensor:
        """The base's tensor in its dtype and shape."""
        key = (name, "base")
        return self._cache.get(key, lambda: self._sent(self._host.get(key, lambda: self._read_base(name))))

    def delta(self, model: str, name: str, base: torch.Tensor) -> TaskVector | None:
        """One model's task vector from the flat `base` on the device; None where it does not change it."""
        key = (name, "held", model)

        def send() -> torch.Tensor | None:
            held = self._host.get(key, lambda: self._read_held(model, name))
            return None if held is None else self._sent(held)

        held = None if model == self._sources.base_name else self._cache.get(key, send)
        return None if held is None else from_held(held, base)

    def arrive(self) -> None:
        """Let what the device does from now on wait for the copies asked for until now."""
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)

    def _read_base(self, name: str) -> torch.Tensor:
        return self._pinned(self._sources.base_tensor(name))

    def _read_held(self, model: str, name: str) -> torch.Tensor | None:
        held = self._sources.held(model, name, self._sources.base_tensor(name).reshape(-1))
        return None if held is None else self._pinned(held)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Page-locked where it is to be copied: only such memory is copied while the device computes."""
        there = tensor.device.type == self._device.type
        return tensor.contiguous() if there else tensor.contiguous().pin_memory()

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device and aligned."""
        if self._copies is None or tensor.device.type == self._device.type:
            return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor
        with torch.cuda.stream(self._copies):
            sent = tensor.to(self._device, non_blocking=True)
        # its memory is not given away before what reads it there is done
        sent.record_stream(torch.cuda.current_stream(self._device))
        return sent
