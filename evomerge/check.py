"""Everything that can be known before the night: opened for real, and two candidates timed.

Imports: `build`, `config`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from evomerge.build import Parts, make_engine, plan_of
from evomerge.config import LoadedConfig
from evomerge.engine.memory import delta_bytes, host_cache_bytes
from evomerge.errors import RunDirError
from evomerge.evaluate.evaluator import evaluate, subset
from evomerge.study.budget import seconds_of

CANDIDATES = 2  # timed; the first one also pays for reading sources and for warming up


def check_run(loaded: LoadedConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Check a run file and time two candidates; returns facts by name.

    Raises:
        EvomergeError: the first thing that would have ended the run.
    """
    parts = Parts.open(loaded)
    facts: dict[str, Any] = {
        "sources": [
            f"{row['name']}: {row['kind']}, {row['parameters'] / 1e6:.1f} M parameters, "
            f"SHA-256 {row['sha256'][:12]}"
            for row in parts.sources.describe()
        ],
        "items (calibration/selection/held-out)": {
            task: "/".join(str(n) for n in sizes.values()) for task, sizes in parts.suite.sizes().items()
        },
        "stages": {stage.name: f"{stage.space.dimension} parameters" for stage in parts.stages},
        "run directory": _writable(parts),
        "disk": _disk(parts),
        "task vectors": _memory(parts),
    }
    say("sources, items and spaces are in order; timing two candidates")
    return facts | _timed(parts)


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _writable(parts: Parts) -> str:
    folder = parts.loaded.run_dir
    probe = _existing(folder) / f".{folder.name}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunDirError(
            f"{folder}: cannot be written ({error.strerror}); choose another `run_dir`"
        ) from error
    return str(folder)


def _disk(parts: Parts) -> str:
    free = shutil.disk_usage(_existing(parts.loaded.run_dir)).free
    need = parts.sources.base.bytes if parts.loaded.config.export.model else 0
    if free < need:
        raise RunDirError(
            f"{parts.loaded.run_dir}: {free / 1e9:.1f} GB are free, but the exported model needs "
            f"{need / 1e9:.1f} GB; free space, or set `export.model` to false"
        )
    return f"{free / 1e9:.1f} GB free; the exported model would take {parts.sources.base.bytes / 1e9:.2f} GB"


def _memory(parts: Parts) -> str:
    full = delta_bytes(parts.sources)
    room = host_cache_bytes(parts.loaded.config.engine.cache_gb)
    kept = "all stay in memory" if full <= room else "the rest is read again for each candidate"
    return f"up to {full / 1e9:.2f} GB with the base, room for {room / 1e9:.2f} GB: {kept}"


def _timed(parts: Parts) -> dict[str, Any]:
    """Load and score the last fixed recipe's kind of candidate twice; the second time is the steady one."""
    plan = plan_of(parts, None)
    items = subset(parts.suite, "calibration")
    engine = make_engine(parts)
    seconds = []
    try:
        for fixed in plan.fixed[-CANDIDATES:]:
            start = time.perf_counter()
            engine.load(fixed.recipe)
            evaluate(engine, parts.suite, items)
            seconds.append(time.perf_counter() - start)
    finally:
        engine.close()
    steady = seconds[-1]
    final = plan.reserve(steady / len(items))
    facts: dict[str, Any] = {
        "engine": dict(engine.info),
        "seconds per candidate": f"{steady:.2f} (first {seconds[0]:.2f}), {len(items)} items",
        "fixed recipes": len(plan.fixed),
        "final selection and held-out": f"about {final:.0f} s",
    }
    text = parts.loaded.config.budget.time
    if text is not None:
        room = seconds_of(text, datetime.now()) - final
        facts["candidates in the time budget"] = f"about {max(0, int(room / steady))}"
    return facts
