"""Where task vectors are kept between candidates: the memory plan that `check` prints.

Imports: `sources`; psutil inside a function. Never torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evomerge.sources.source_set import SourceSet

WORKING_SHARE = 0.08  # of an accelerator: activations of the merger, graphs, fragments
LEAST_VLLM_SHARE = 0.5  # of an accelerator: below this, too little is left for keys and values
WEIGHTS_ROOM = 1.3  # vLLM's share holds at least the weights and some keys and values


def delta_bytes(sources: SourceSet) -> int:
    """Bytes of the base and of all task vectors in float32: what a cache of everything would hold."""
    deltas = sum(
        4 * info.numel
        for model in sources.models
        for name, info in sources.base.tensors.items()
        if sources.may_change(model, name)
    )
    return sources.base.bytes + deltas


def host_cache_bytes(cache_gb: float | None) -> int:
    """Bytes that a cache in the machine's memory may take: as asked, or half of what is free now."""
    if cache_gb is not None:
        return int(cache_gb * 1e9)
    import psutil

    return int(psutil.virtual_memory().available) // 2


@dataclass(frozen=True)
class MemoryPlan:
    """What the merger keeps beside vLLM, and where.

    Attributes:
        place: `device`, `host`, or `files` (read again for every candidate).
        cache_bytes: kept there, for one worker.
        vllm_share: of the accelerator's memory, what vLLM may take.
    """

    place: Literal["device", "host", "files"]
    cache_bytes: int
    vllm_share: float


def plan_accelerator(total: int, weights: int, deltas: int, cache_gb: float | None = None) -> MemoryPlan:
    """The plan for one accelerator.

    Everything stays on the card if vLLM keeps room for its weights and half of the card; what does not fit
    is read again for each candidate.

    Args:
        total: bytes of the card.
        weights: bytes of the weights that vLLM holds on it.
        deltas: see `delta_bytes`.
        cache_gb: the user's own limit.
    """
    room = total * (1 - WORKING_SHARE) - max(LEAST_VLLM_SHARE * total, WEIGHTS_ROOM * weights)
    kept = int(max(0.0, min(deltas, room if cache_gb is None else cache_gb * 1e9)))
    return MemoryPlan("device" if kept else "files", kept, round(1 - WORKING_SHARE - kept / total, 3))
