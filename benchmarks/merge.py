"""How fast is a merge on the CPU, beside a plain copy and beside mergekit? Writes benchmarks/merge.md.

    python benchmarks/merge.py [--sources 2 3 8] [--methods ties ...] [--candidates 5] [--folder FOLDER]

SmolLM2-135M-Instruct and full bfloat16 checkpoints made from the example's adapters. Every row is a process
of its own. A candidate has other weights and densities than the one before, as in a search; nothing is
written to the disk. Its time stands beside that of a `torch.Tensor.copy_` moving as many bytes, measured in
the same process right after; tensors that no source changes are handed on as they are and do not count.

mergekit is run on the same recipe, in a fresh process: the whole process, and `run_merge` alone (which
reads, merges and writes).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from evomerge.build import versions
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Recipe, Setting
from evomerge.report.outcome import markdown_table
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "smollm2"
METHODS = (
    "linear",
    "task_arithmetic",
    "ties",
    "dare_ties",
    "breadcrumbs",
    "della",
    "model_stock",
    "sce",
    "slerp",
)
# scale of (math, spanish, extract) in each source
SOURCES = (
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (0.5, 0.5, 0),
    (0, 0.5, 0.5),
    (0.5, 0, 0.5),
    (0.7, 0.2, 0.1),
    (0.2, 0.7, 0.3),
)
MERGEKIT = """
import sys, time, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
config = MergeConfiguration.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))
start = time.perf_counter()
run_merge(config, sys.argv[2], MergeOptions(quiet=True))
print("SECONDS", time.perf_counter() - start)
"""


def main() -> None:
    """Make the sources, measure every method and count of sources, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--candidates", type=int, default=5, help="after the first")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where sources are made; removed at the end"
    )
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "METHOD", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, method, count = arguments.measure
        print(json.dumps(measure(Path(folder), method, int(count), arguments.candidates)))
        return
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=arguments.folder))
    rows = []
    try:
        make_sources(folder, max(arguments.sources))
        for method in arguments.methods:
            for count in arguments.sources:
                if method == "slerp" and count != 2:
                    continue
                rows.append(row(folder, method, count, arguments))
                print(*rows[-1], flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = report(rows, arguments)
    (ROOT / "benchmarks" / "merge.md").write_text(text, encoding="utf-8")
    print(text)


def make_sources(folder: Path, count: int) -> None:
    """Full checkpoints: the base plus the adapters at the scales in `SOURCES`."""
    names = ("math", "spanish", "extract")
    adapters = {name: SourceRef(adapter=str(EXAMPLE / "adapters" / name)) for name in names}
    sources = SourceSet.open(SourceRef(model=str(EXAMPLE / "base")), adapters)
    layout = sources.layout()
    from evomerge.export.bundle import export_model

    for number, scales in enumerate(SOURCES[:count]):
        models = {name: {"weight": float(scale)} for name, scale in zip(names, scales, strict=True) if scale}
        setting = Setting("task_arithmetic", {}, models)
        recipe = Recipe(sources.base_name, names, dict.fromkeys(layout.by_cell, setting))
        export_model(folder / f"m{number}", recipe, sources, layout, max_shard_bytes=5 * 10**9)


def setting_of(method: str, count: int, candidate: int) -> Setting:
    """A setting whose weights and densities change from candidate to candidate."""
    step = 0.01 * candidate
    usual = {
        "weight": 0.3 + step,
        "density": 0.4 + step,
        "gamma": 0.01 + step / 10,
        "epsilon": 0.1 + step / 10,
    }
    spec = SPECS[method]
    values = {key: usual[key] for key in spec.per_model if key in usual}
    shared = {"t": 0.4 + step} if method == "slerp" else {}
    shared |= {"select_topk": 0.5 + step} if method == "sce" else {}
    return Setting(method, shared, {f"m{i}": values for i in range(count)})


def measure(folder: Path, method: str, count: int, candidates: int) -> dict[str, Any]:
    """Seconds of the first candidate and of later ones, of a copy, and peak memory."""
    models = {f"m{i}": SourceRef(model=str(folder / f"m{i}")) for i in range(count)}
    sources = SourceSet.open(SourceRef(model=str(EXAMPLE / "base")), models)
    layout = sources.layout()
    merger = Merger(sources, cache_bytes=12 << 30)
    seconds = []
    for candidate in range(candidates + 1):
        setting = setting_of(method, count, candidate)
        recipe = Recipe(sources.base_name, sources.models, dict.fromkeys(layout.by_cell, setting))
        start = time.perf_counter()
        for _ in merger.materialize(MergePlan.compile(recipe, layout)):
            pass
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    changed = [n for n in layout.tensors if any(sources.delta(model, n) is not None for model in models)]
    moved = sum(sources.base.tensors[name].nbytes for name in changed) * (count + 2)
    return {
        "first": seconds[0],
        "next": statistics.median(seconds[1:]),
        "copy": copy_seconds(moved),
        "moved": moved,
        "peak": peak,
    }


def copy_seconds(moved: int) -> float:
    """Median seconds of a copy that reads and writes `moved` bytes in all."""
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def row(folder: Path, method: str, count: int, arguments: argparse.Namespace) -> list[str]:
    """One row of the table."""
    words = [sys.executable, __file__, "--candidates", str(arguments.candidates)]
    words += ["--measure", str(folder), method, str(count)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    whole, alone = (0.0, 0.0) if arguments.no_mergekit else mergekit(folder, method, count)
    against = f"{alone:.2f} s = {alone / found['next']:.1f}x" if alone else "-"
    process = f"{whole:.1f} s = {whole / found['next']:.0f}x" if whole else "-"
    return [
        method,
        str(count),
        f"{found['next']:.3f}",
        f"{found['moved'] / found['next'] / 1e9:.1f}",
        f"{found['copy'] / found['next']:.2f}",
        f"{found['first']:.2f}",
        f"{found['peak'] / 1e9:.2f}",
        against,
        process,
    ]


def mergekit(folder: Path, method: str, count: int) -> tuple[float, float]:
    """Seconds of a whole mergekit process, and of its merge alone."""
    setting = SPECS[method].complete(setting_of(method, count, 0), method)
    names = list(setting.models)
    base = names[0] if method == "slerp" else str(EXAMPLE / "base")
    document = {
        "merge_method": SPECS[method].mergekit,
        "base_model": str(folder / base) if method == "slerp" else base,
        "models": [{"model": str(folder / n), "parameters": dict(setting.models[n])} for n in names],
        "parameters": dict(setting.parameters),
        "dtype": "bfloat16",
    }
    if method == "linear":
        document["models"].append({"model": base, "parameters": {"weight": 0.0}})
    path, out = folder / "mergekit.yaml", folder / "mergekit-out"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    start = time.perf_counter()
    words = [sys.executable, "-c", MERGEKIT, str(path), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"mergekit failed on {method}:\n{done.stderr[-2000:]}")
    shutil.rmtree(out)
    return whole, float(done.stdout.split("SECONDS")[1])


def report(rows: list[list[str]], arguments: argparse.Namespace) -> str:
    """The whole page."""
    header = ["method", "sources", "s / candidate", "GB/s", "of copy", "first s", "peak GB"]
    header += ["mergekit, merge alone", "mergekit, process"]
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    paragraphs = [
        "# Merging on the CPU",
        "Made by `python benchmarks/merge.py`. SmolLM2-135M-Instruct and full bfloat16 checkpoints; median "
        f"of {arguments.candidates} candidates after the first, each with other weights and densities; "
        "nothing is written to the disk. GB/s: base and sources read once and the result written once, in "
        "bfloat16, whatever is cached, of the tensors that a source changes. Of copy: time of a plain copy "
        "that moves as many bytes, divided by "
        "that of the candidate. mergekit merges the same recipe in a process of its own and writes it; its "
        "times are followed by their ratio to our candidate.",
        markdown_table(header, rows),
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads; "
        f"{libraries}, mergekit {version('mergekit')}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main()
