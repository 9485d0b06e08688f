"""Makes engines; the libraries behind an engine are imported when it is made.

Imports: `engine`, `merge`, `sources`.
"""

from __future__ import annotations

from evomerge.engine.base import Engine
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet


def transformers_engine(
    sources: SourceSet,
    layout: Layout,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = 8192,
    cache_gb: float | None = None,
) -> Engine:
    """A transformers engine; `cache_gb` None lets task vectors take half of the device's free memory."""
    from evomerge.engine.transformers_engine import TransformersEngine, pick_device
    from evomerge.merge.merger import Merger

    device = pick_device(device)
    host = cache_bytes(None) if device.startswith("cuda") else 0
    merger = Merger(sources, device=device, cache_bytes=cache_bytes(cache_gb, device), host_bytes=host)
    folder = sources.folders[sources.base_name]
    return TransformersEngine(folder, merger, layout, device=device, dtype=dtype, batch_tokens=batch_tokens)


def cache_bytes(cache_gb: float | None, device: str = "cpu") -> int:
    """Bytes that cached task vectors may take: as asked, or half of the device's memory that is free now."""
    if cache_gb is not None:
        return int(cache_gb * 1e9)
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0] // 2
    import psutil

    return int(psutil.virtual_memory().available) // 2
