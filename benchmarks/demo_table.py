"""Does searching pay, and with which optimizer? Writes benchmarks/demo_table.md.

    python benchmarks/demo_table.py [--seeds 3] [--item-evaluations 3000] [--jobs 2] [--out FOLDER]

Runs the demo's search for every optimizer and seed at equal item evaluations (fixed recipes included), each
run in a process of its own with one thread. A stopped benchmark goes on where it was. Fixed recipes are the
same in every run: the first run, which has the machine to itself, asks their answers; the others copy them
and still count them among their item evaluations.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from evomerge.build import Parts, make_engine, versions
from evomerge.config import load_config
from evomerge.evaluate.evaluator import subset
from evomerge.evaluate.records import ItemStore
from evomerge.evaluate.score import interval, score_tasks, values_by_task
from evomerge.report.outcome import markdown_table
from evomerge.study.fixed import fixed_recipes
from evomerge.study.scoring import Scorebook

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = ("cma", "mixed", "tpe", "random")
SCALES = (0.3, 0.7)  # of task arithmetic, beside the demo's own
ITEMS = {"calibration": 16, "selection": 32, "held_out": 96}
COMPOSITE = "spanish_math"
Outcomes = dict[tuple[str, int], dict[str, Any]]  # by optimizer and seed


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--item-evaluations", type=int, default=3000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo_table")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [(name, seed) for seed in range(arguments.seeds) for name in OPTIMIZERS]
    files = [write_run(arguments.out, name, seed, arguments.item_evaluations) for name, seed in runs]
    started = time.monotonic()
    # The first run scores the fixed recipes on the held-out items; the others find its answers.
    run(files[0], None, arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda file: run(file, files[0], 1), files[1:]))
    seconds = time.monotonic() - started
    text = report(dict(zip(runs, files, strict=True)), more_scales(files[0]), arguments, seconds)
    (ROOT / "benchmarks" / "demo_table.md").write_text(text, encoding="utf-8")
    print(text)


def write_run(folder: Path, optimizer: str, seed: int, item_evaluations: int) -> Path:
    """The run file of one optimizer and seed: the demo's, with another optimizer, seed and budget."""
    data = yaml.safe_load((ROOT / "runs" / "demo.yaml").read_text(encoding="utf-8"))
    example = ROOT / "examples" / "smollm2"
    data["base_model"] = str(example / "base")
    data["models"] = {name: {"adapter": str(example / "adapters" / name)} for name in data["models"]}
    data["items"] = ITEMS
    data["budget"] = {"item_evaluations": item_evaluations}
    data["search"] = {**data.get("search", {}), "optimizer": optimizer}
    data["selection"] = {"top": 3}
    data["fixed"] = {**data.get("fixed", {}), "screen_items": 8}
    data["export"] = {"model": False}
    data["seed"] = seed
    path = folder / f"{optimizer}-{seed}.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def run(file: Path, first: Path | None, threads: int) -> None:
    """Begin or go on with one run, unless it is finished."""
    folder = file.with_suffix("")
    if (folder / "outcome.json").exists():
        return
    if first is not None:
        known = first.with_suffix("") / "items"
        for answers in known.rglob("*.jsonl.gz"):
            target = folder / "items" / answers.relative_to(known)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(answers, target)
    words = ["search", str(file)] + (["--resume"] if (folder / "config.json").exists() else [])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "evomerge", *words], env=environment, check=True)


def more_scales(file: Path) -> list[dict[str, Any]]:
    """Task arithmetic at scales that the demo's run leaves out, on the same held-out items."""
    parts = Parts.open(load_config(file))
    wanted = {f"task arithmetic {scale:g}" for scale in SCALES}
    fixed = [f for f in fixed_recipes(parts.family, scales=SCALES, subset_scales=())]
    fixed = [recipe for recipe in fixed if recipe.label in wanted]
    engine = make_engine(parts)
    entries = []
    with parts.suite.unsealed():
        book = Scorebook(engine, parts.suite, ItemStore(file.with_suffix("") / "items"), print)
        for recipe in fixed:
            items = subset(parts.suite, "held_out")
            found = book.score(
                recipe.recipe, items, f"held_out/more-{recipe.label.replace(' ', '-')}-"
            ).scores
            tasks = {task: score._asdict() for task, score in score_tasks(found).items()}
            value = interval(values_by_task(found), parts.suite.weights, parts.suite.aggregate, 0)._asdict()
            entries.append(
                {
                    "label": recipe.label,
                    "kind": "fixed",
                    "calibration": None,
                    "held_out": value,
                    "tasks": tasks,
                }
            )
    engine.close()
    return entries


def report(
    files: dict[tuple[str, int], Path],
    more: Sequence[dict[str, Any]],
    arguments: argparse.Namespace,
    seconds: float,
) -> str:
    """The whole page."""
    outcomes = {
        key: json.loads((file.with_suffix("") / "outcome.json").read_text(encoding="utf-8"))
        for key, file in files.items()
    }
    header = ["recipe", "seed", "calibration", "held-out mean [95 %]", "composite [95 %]", "beats best"]
    baselines = [e for e in next(iter(outcomes.values()))["entries"] if e["kind"] != "search"]
    rows = [*winner_rows(outcomes), *baseline_rows([*baselines, *more])]
    mean_rows = []
    for name in OPTIMIZERS:
        found = [entry for (own, _), entry in winners(outcomes) if own == name]
        fitness = mean([entry["held_out"]["value"] for entry in found])
        composite = mean([entry["tasks"][COMPOSITE]["mean"] for entry in found])
        mean_rows.append([name, f"{fitness:.3f}", f"{composite:.3f}"])
    items = ", ".join(f"{4 * n} {split.replace('_', '-')}" for split, n in ITEMS.items())
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    paragraphs = [
        "# Optimizers on the demo's family",
        f"Made by `python benchmarks/demo_table.py`: {len(OPTIMIZERS)} optimizers, {arguments.seeds} seeds, "
        f"{arguments.item_evaluations} calibration item evaluations a run, fixed recipes included. "
        f"Items: {items}. The mean is over four tasks; the composite, Spanish word problems, is one that no "
        "expert was trained on. Intervals: 95 %, bootstrap over held-out items (mean) or Wilson (composite). "
        "The last column: over what the winner's gain is significant, the best source, the best fixed "
        "recipe, or both.",
        markdown_table(header, rows),
        f"Means over the {arguments.seeds} seeds:",
        markdown_table(["optimizer", "held-out mean", "composite"], mean_rows),
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, one thread a run, {arguments.jobs} runs "
        f"at a time; the last invocation took {seconds:.0f} s. {libraries}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def winners(outcomes: Outcomes) -> list[tuple[tuple[str, int], dict[str, Any]]]:
    """Each run's winner, by optimizer and seed."""
    order = sorted(outcomes, key=lambda key: (OPTIMIZERS.index(key[0]), key[1]))
    return [(key, outcomes[key]["entries"][0]) for key in order]


def winner_rows(outcomes: Outcomes) -> Iterator[list[str]]:
    """One row per run: its winner."""
    for (name, seed), entry in winners(outcomes):
        label = f"**{name}**" if entry["kind"] == "search" else f"**{name}** (chose `{entry['label']}`)"
        # a chosen fixed recipe is the best one, and its lead over the next is no gain from the search
        found = outcomes[name, seed]["significant"].items()
        gains = [what for what, yes in found if yes and (what, entry["kind"]) != ("fixed", "fixed")]
        yield [label, str(seed), *scores(entry), " and ".join(gains) or "-"]


def baseline_rows(entries: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """One row per source and fixed recipe, the best first; they are the same in every run."""
    for entry in sorted(entries, key=lambda entry: -entry["held_out"]["value"]):
        yield [entry["label"], "", *scores(entry), ""]


def scores(entry: dict[str, Any]) -> list[str]:
    """Calibration, held-out mean and composite of one entry."""
    held_out, task = entry["held_out"], entry["tasks"][COMPOSITE]
    low, high = wilson(round(task["mean"] * task["n"]), task["n"])
    return [
        "" if entry["calibration"] is None else f"{entry['calibration']:.3f}",
        f"{held_out['value']:.3f} [{held_out['low']:.3f}, {held_out['high']:.3f}]",
        f"{task['mean']:.3f} [{low:.3f}, {high:.3f}]",
    ]


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p, d = hits / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    centre = (p + z * z / (2 * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
