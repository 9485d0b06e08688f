"""Where a run stands, read from its directory without disturbing it.

Imports: `build` (paths), `study`; never torch.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from evomerge.build import LOCK, begun_with
from evomerge.study.storage import JOURNAL, TrialLog
from evomerge.study.study import best_trial


def read_status(run_dir: Path) -> dict[str, Any]:
    """Facts about a run as plain data.

    Keys: run, state ("running", "stopped" or "finished"), headline (of a finished run), trials, outcomes,
    stages, incumbent (trial, stage, label, fitness, stderr, scores), item_evaluations, seconds, started.

    Raises:
        RunDirError: no run was begun there.
    """
    config = begun_with(run_dir)
    location = config["storage"] or str(run_dir / JOURNAL)
    log = TrialLog(location, config["name"])
    try:
        trials = log.trials
    finally:
        log.close()
    best = best_trial(trials)
    outcome = run_dir / "outcome.json"
    headline = json.loads(outcome.read_text(encoding="utf-8"))["headline"] if outcome.exists() else ""
    return {
        "run": str(run_dir),
        "state": "finished" if headline else "running" if _in_use(run_dir) else "stopped",
        "headline": headline,
        "started": config["started"],
        "trials": len(trials),
        "outcomes": dict(Counter(trial.outcome.value for trial in trials)),
        "stages": dict(Counter(trial.stage for trial in trials)),
        "item_evaluations": sum(trial.items for trial in trials),
        "seconds": trials[-1].elapsed if trials else 0.0,
        "incumbent": None
        if best is None
        else {
            "trial": best.number,
            "stage": best.stage,
            "label": best.label,
            "fitness": best.fitness,
            "stderr": best.stderr,
            "scores": {task: score.mean for task, score in best.scores.items()},
        },
    }


def status_rows(facts: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The facts as a table of two columns."""
    best = facts["incumbent"]
    rows = [
        ["run", facts["run"]],
        ["state", facts["state"]],
        ["started", facts["started"]],
        ["trials", f"{facts['trials']} ({_counts(facts['outcomes'])})"],
        ["stages", _counts(facts["stages"])],
        ["item evaluations", str(facts["item_evaluations"])],
        ["time", f"{facts['seconds']:.0f} s"],
    ]
    if best is not None:
        error = "" if best["stderr"] is None else f" ±{best['stderr']:.3f}"
        name = best["label"] or best["stage"]
        rows.append(["incumbent", f"{best['fitness']:.3f}{error} (trial {best['trial']}, {name})"])
        rows.append(["its scores", ", ".join(f"{task} {mean:.3f}" for task, mean in best["scores"].items())])
    return ["", ""], rows


def _counts(table: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in table.items()) or "none"


def _in_use(run_dir: Path) -> bool:
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
