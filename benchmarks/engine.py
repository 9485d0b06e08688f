"""What a candidate costs with the transformers engine, by dtype and batch size; prints a Markdown table.

    python benchmarks/engine.py [--items 32] [--device auto]

Loads two candidates of the demo's family in turn, twice each, and reports the second round: seconds to merge
into the engine, seconds to answer and score the items, items per second.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

from evomerge.build import Parts, versions
from evomerge.config import load_config
from evomerge.engine.factory import transformers_engine
from evomerge.evaluate.evaluator import evaluate, subset
from evomerge.recipe import Setting
from evomerge.report.outcome import markdown_table

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure every combination."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=32, help="calibration items per task")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch-tokens", nargs="+", type=int, default=[2048, 4096, 8192])
    arguments = parser.parse_args()
    parts = Parts.open(load_config(ROOT / "runs" / "demo.yaml"))
    items = subset(parts.suite, "calibration", arguments.items)
    candidates = [
        parts.family.recipe(
            dict.fromkeys(
                parts.layout.by_cell,
                Setting("task_arithmetic", {}, {m: {"weight": weight} for m in parts.sources.models}),
            )
        )
        for weight in (0.5, 0.6)
    ]
    rows = []
    for dtype in arguments.dtypes:
        for batch_tokens in arguments.batch_tokens:
            engine = transformers_engine(
                parts.sources, parts.layout, device=arguments.device, dtype=dtype, batch_tokens=batch_tokens
            )
            for recipe in [*candidates, candidates[0]]:
                merging = engine.load(recipe).seconds
                start = time.perf_counter()
                evaluate(engine, parts.suite, items)
                seconds = time.perf_counter() - start
            engine.close()
            rows.append(
                [dtype, str(batch_tokens), f"{merging:.2f}", f"{seconds:.2f}", f"{len(items) / seconds:.1f}"]
            )
    print(markdown_table(["dtype", "batch tokens", "merge s", "evaluate s", "items/s"], rows))
    info = ", ".join(f"{key} {value}" for key, value in engine.info.items() if key != "dtype")
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    print(f"\n{len(items)} items; {machine}; {info}; evomerge {versions()['evomerge']}")


if __name__ == "__main__":
    main()
