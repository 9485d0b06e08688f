"""Engine processes that are broken on purpose: `python -m tests.engine.broken_hosts KIND FD FD`.

A stale cache, a stale weight and a stale packed copy have to be noticed (promise 4).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from evomerge.engine import vllm_host, vllm_worker

SOUND = vllm_worker.Stream
STALE = "model.layers.1.mlp.down_proj.weight"


class StaleCache(vllm_host.Host):
    """Keeps keys and values of the candidate before."""

    def _forget(self) -> None:
        """Drop nothing."""


class Hanging(vllm_host.Host):
    """Starts, and then never answers a request."""

    def generate(self, **_: Any) -> dict[str, Any]:
        """Hang as a deadlocked worker does."""
        time.sleep(600)
        return {}


class StaleStream(vllm_worker.Stream):
    """Loses one tensor of every candidate; what vLLM holds of it stays as it was."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All but one."""
        for name, tensor in super().__iter__():
            if name != STALE:
                yield name, tensor


class OtherStream(vllm_worker.Stream):
    """Hands vLLM another tensor than was merged."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One with two elements changed."""
        for name, tensor in super().__iter__():
            if name == STALE:
                tensor = tensor.clone()
                tensor.view(-1)[:2] += 0.5
            yield name, tensor


class LaterStream(OtherStream):
    """Hands vLLM what was merged, as long as all tensors are asked for."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The right tensors or others."""
        everything = all(op.tensor in self._wanted for op in self._plan.ops)
        return SOUND.__iter__(self) if everything else super().__iter__()


class StalePacking(vllm_worker.PackedWeights):
    """As if vLLM did not pack the output layer again."""

    def _watch(self, method: Any) -> None:
        """Take the work away from the embedding's method."""
        if type(method).__name__ == "UnquantizedEmbeddingMethod":
            method.process_weights_after_loading = lambda layer: None
        super()._watch(method)


if __name__ == "__main__":
    kind, fds = sys.argv[1], sys.argv[2:]
    streams = {"StaleStream": StaleStream, "OtherStream": OtherStream, "LaterStream": LaterStream}
    if kind in streams:
        vllm_worker.Stream = streams[kind]  # type: ignore[misc]
    if kind == "StalePacking":
        vllm_worker.PackedWeights = StalePacking  # type: ignore[misc]
    hosts = {"StaleCache": StaleCache, "Hanging": Hanging}
    vllm_host.main(hosts.get(kind, vllm_host.Host)(), fds)
