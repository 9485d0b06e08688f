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
    """What one merger keeps, and where: the arguments of `Merger`, and what they leave to vLLM.

    Attributes:
        place: `device`, `host`, or `files` (read again for every candidate).
        cache_bytes: kept there.
        host_bytes: beside an accelerator, pinned memory for what does not fit on the card.
        vllm_share: of the accelerator's memory, what vLLM may take; 1 where there is none.
    """

    place: Literal["device", "host", "files"]
    cache_bytes: int
    host_bytes: int = 0
    vllm_share: float = 1.0

    def __str__(self) -> str:
        """For the run's record."""
        more = f", {self.host_bytes / 1e9:.2f} GB in pinned memory" if self.host_bytes else ""
        return f"{self.cache_bytes / 1e9:.2f} GB kept in {self.place}{more}"


def plan_host(cache_gb: float | None, workers: int = 1) -> MemoryPlan:
    """The plan for each of some mergers in the machine's memory."""
    return MemoryPlan("host", host_cache_bytes(cache_gb) // workers)


def plan_shared_card(free: int, cache_gb: float | None) -> MemoryPlan:
    """The plan beside the transformers engine: half of the card's memory that is free now, and of the host's.

    Args:
        free: bytes of the card.
        cache_gb: the user's own limit on the card.
    """
    kept = free // 2 if cache_gb is None else int(cache_gb * 1e9)
    return MemoryPlan("device", kept, host_cache_bytes(None))


def plan_accelerator(
    total: int, weights: int, deltas: int, cache_gb: float | None = None, workers: int = 1
) -> MemoryPlan:
    """The plan beside vLLM, for each of some workers with an accelerator of its own.

    Everything stays on the card if vLLM keeps room for its weights and half of the card. What does not fit
    stays in pinned memory as far as half of the host's reaches; the rest is read again for each candidate.

    Args:
        total: bytes of the card.
        weights: bytes of the weights that vLLM holds on all cards.
        deltas: see `delta_bytes`.
        cache_gb: the user's own limit for all cards.
        workers: number of cards.
    """
    room = total * (1 - WORKING_SHARE) - max(LEAST_VLLM_SHARE * total, WEIGHTS_ROOM * weights / workers)
    kept = int(max(0.0, min(deltas, room if cache_gb is None else cache_gb * 1e9 / workers)))
    pinned = min(deltas - kept, host_cache_bytes(None) // workers)
    share = round(1 - WORKING_SHARE - kept / total, 3)
    return MemoryPlan("device" if kept else "host" if pinned else "files", kept, pinned, share)
