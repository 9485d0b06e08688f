"""A suite on disk, small enough to read: two tasks, three splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SPLITS = ("calibration", "selection", "held_out")


def make_rows(name: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}-{split}-{i}", "split": split, "question": f"{name} {split} {i}?", "answer": str(i)}
        for split in SPLITS
        for i in range(3)
    ]


@pytest.fixture
def rows() -> Callable[[str], list[dict[str, Any]]]:
    """Makes three items for each split, in the order of the splits, with different questions."""
    return make_rows


@pytest.fixture
def write_suite(tmp_path: Path) -> Callable[..., Path]:
    """Writes `suite.yaml` with a task for each list of rows; `options` and `top` override keys."""

    def write(
        content: dict[str, Any] | None = None, *, top: dict[str, Any] | None = None, **options: Any
    ) -> Path:
        tasks = {}
        for name, items in (content or {"math": make_rows("math"), "words": make_rows("words")}).items():
            lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            tasks[name] = {"data": f"{name}.jsonl", "prompt": "{{ question }}\nAnswer:", "scorer": "numeric"}
            tasks[name] |= options
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({"tasks": tasks, **(top or {})}), encoding="utf-8")
        return path

    return write
