"""A whole small run on disk: tiny models, an adapter, a task suite and a run file. For end-to-end tests."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge import cli
from tests.tiny import tiny_adapter, tiny_model

SPLITS = ("calibration", "selection", "held_out")


@dataclass
class World:
    """Paths of a small run; `run` is the content of its run file, `write` puts it on disk."""

    folder: Path
    run: dict[str, Any]

    @property
    def run_file(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def run_dir(self) -> Path:
        return self.folder / "tiny"

    @property
    def items(self) -> Path:
        return self.folder / "items.jsonl"

    def write(self) -> Path:
        self.run_file.write_text(yaml.safe_dump(self.run, sort_keys=False), encoding="utf-8")
        return self.run_file


def item_rows(per_split: int = 6) -> list[dict[str, object]]:
    """Questions of a few letters; the answer is a letter, so that tiny random models hit some of them."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        {
            "id": f"{split}-{i}",
            "split": split,
            "question": f"{letters[i]} {letters[(7 * i + 3) % 26]} {letters[j + 20]}",
            "answer": letters[(5 * i + j) % 26],
            "choices": ["a", "b"],
        }
        for j, split in enumerate(SPLITS)
        for i in range(per_split)
    ]


def write_items(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_sources(folder: Path) -> None:
    """A base, two full fine-tunes and an adapter, in bf16."""
    base = tiny_model(folder / "base", layers=3)
    tiny_model(folder / "one", seed=1, noise_from=base, noise=0.05, layers=3)
    tiny_model(folder / "two", seed=2, noise_from=base, noise=0.05, layers=3)
    tiny_adapter(folder / "adapter", base, seed=3)


def make_world(folder: Path, sources: Path) -> World:
    """A run over `sources` in `folder`, its files copied so that a test may break them."""
    for name in ("base", "one", "two", "adapter"):
        shutil.copytree(sources / name, folder / name)
    write_items(folder / "items.jsonl", item_rows())
    tasks = {
        "letter": {"data": "items.jsonl", "prompt": "{{ question }}", "scorer": "contains", "max_tokens": 6},
        "text": {
            "data": "items.jsonl",
            "prompt": "{{ question }} is",
            "scorer": {"type": "nll"},
        },
    }
    suite = {"aggregate": "mean", "tasks": tasks}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    run = {
        "base_model": "./base",
        "models": {"one": "./one", "two": {"model": "./two"}, "lora": {"adapter": "./adapter"}},
        "fitness": "suite.yaml",
        "budget": {"trials": 34},
        "search": {"population_size": 4, "stages": [{"space": "global"}, {"space": "modules"}]},
        "fixed": {"screen_items": 2, "promote": 2, "subset_scales": [0.5, 1.0]},
        "engine": {"kind": "transformers", "device": "cpu", "cache_gb": 0.1},
        "selection": {"top": 2},
    }
    world = World(folder, run)
    world.write()
    return world


def run_cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err
