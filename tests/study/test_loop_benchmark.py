"""The benchmark of the outer loop runs, and says what it promises."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import optuna
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loop.py"


@pytest.fixture
def loop(monkeypatch):
    spec = importlib.util.spec_from_file_location("loop", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "loop", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_report_has_a_row_for_every_mark_and_a_verdict_for_every_pair(loop, tmp_path):
    """`cma` runs through, `tpe` is filled up to each mark."""
    ask = optuna.Study.ask
    out = tmp_path / "loop.md"
    loop.main(["--quick", "--optimizers", "cma", "tpe", "--folder", str(tmp_path), "--out", str(out)])
    lines = out.read_text(encoding="utf-8").splitlines()
    head = "| optimizer | storage | trial | ask | decode | record | tell | all | Optuna | worst |"
    assert head in lines
    for optimizer in ("cma", "tpe"):
        for storage in ("journal", "sqlite"):
            rows = [line.split(" | ") for line in lines if line.startswith(f"| {optimizer} | {storage} | ")]
            assert [row[2] for row in rows] == ["4", "8", "12", "14"]
            assert all(float(cell.strip(" |")) > 0 for row in rows[:3] for cell in row[3:])
            assert sum(line.startswith(f"- `{optimizer}`, {storage}: ") for line in lines) == 1
    assert any(line.startswith("- libraries: evomerge ") for line in lines)
    assert optuna.Study.ask is ask


def test_the_space_has_as_many_parameters_as_blocks_models_and_modules_make(loop):
    """6 blocks, attention and mlp apart, 3 models."""
    assert loop.dimension() == 6 * 2 * 3
