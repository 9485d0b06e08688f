"""The script that measures merging on a GPU runs, without one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("merge_gpu")


def test_every_method_is_measured_and_merges_as_in_float64(script, monkeypatch, capsys):
    words = ["merge_gpu.py", "--device", "cpu", "--tiny", "--candidates", "1", "--sources", "3"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    methods, errors = [row[1].strip() for row in table[2:]], [float(row[8]) for row in table[2:]]
    assert methods == [*script.NAMES, *script.NAMES]
    assert all(0.1 < error < 0.51 for error in errors)


def test_the_models_have_the_parameters_that_their_names_say(script):
    """The model cards of Llama-2-7B and Qwen2.5-7B say 6.74 and 7.61 billion."""
    found = {name: shape.entries() for name, shape in script.SHAPES.items()}
    assert found["llama2-7b"] == 6_738_415_616
    assert found["qwen2.5-7b"] == 7_615_616_512
