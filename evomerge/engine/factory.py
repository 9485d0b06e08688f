"""Makes engines; the libraries behind an engine are imported when it is made.

Imports: `engine`, `errors`, `merge`, `sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from evomerge.engine import vllm_compat
from evomerge.engine.base import Engine
from evomerge.engine.memory import plan_host, plan_shared_card
from evomerge.errors import ConfigError
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet

Kind = Literal["auto", "transformers", "vllm"]


def engine_kind(kind: Kind, device: str = "auto", options: Mapping[str, Any] | None = None) -> Kind:
    """Which engine `kind` means here: `auto` is vLLM where it is installed and chooses its own device.

    Raises:
        ConfigError: `options`, which are vLLM's, or a device, do not go with the engine.
    """
    if kind == "auto":
        kind = "vllm" if device == "auto" and vllm_compat.installed() else "transformers"
        chosen = f"`engine.kind: auto` is {kind} here"
    else:
        chosen = f"`engine.kind` is {kind}"
    if kind == "transformers" and options:
        raise ConfigError(
            f"`engine.options` has {', '.join(options)}, which are arguments of vLLM, but {chosen}; remove "
            "them, or install vLLM and set `engine.kind: vllm`"
        )
    if kind == "vllm" and device != "auto":
        raise ConfigError(
            f"`engine.device` is {device!r}, but {chosen}, which takes the device that it was built for; set "
            "`engine.device: auto`, or `engine.kind: transformers`"
        )
    vllm_compat.check_reserved(options or {})
    return kind


def open_engine(
    sources: SourceSet,
    layout: Layout,
    *,
    kind: Kind = "auto",
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int = 8192,
    cache_gb: float | None = None,
    options: Mapping[str, Any] | None = None,
    timeout: float = 600.0,
    log: Path | None = None,
) -> Engine:
    """An engine with the base model's weights.

    Args:
        sources, layout: what is merged.
        kind: see `engine_kind`.
        device, dtype, batch_tokens: of the transformers engine; vLLM takes the dtype too.
        cache_gb: memory for task vectors; None lets them take what is free, within reason.
        options, timeout, log: of the vLLM engine.

    Raises:
        ConfigError: what does not go together.
        EngineError: the engine does not start.
    """
    if engine_kind(kind, device, options) == "vllm":
        from evomerge.engine.vllm_engine import VllmEngine

        return VllmEngine(
            sources, layout, dtype=dtype, options=options, cache_gb=cache_gb, timeout=timeout, log=log
        )
    return transformers_engine(
        sources, layout, device=device, dtype=dtype, batch_tokens=batch_tokens, cache_gb=cache_gb
    )


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
    import torch

    from evomerge.engine.transformers_engine import TransformersEngine, pick_device
    from evomerge.merge.merger import Merger

    device = pick_device(device)
    if device.startswith("cuda"):
        plan = plan_shared_card(torch.cuda.mem_get_info(device)[0], cache_gb)
    else:
        plan = plan_host(cache_gb)
    merger = Merger(sources, device=device, cache_bytes=plan.cache_bytes, host_bytes=plan.host_bytes)
    folder = sources.folders[sources.base_name]
    return TransformersEngine(folder, merger, layout, device=device, dtype=dtype, batch_tokens=batch_tokens)
