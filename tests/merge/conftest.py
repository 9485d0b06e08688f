"""Shared by the tests of the merge side: goldens, and inputs for a method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.merge.methods import METHODS
from evomerge.merge.methods._method import CHUNK, TensorInputs
from evomerge.recipe import Setting
from tests.threads import one_thread as one_thread

GOLDENS = Path(__file__).parents[1] / "goldens" / "methods.json"


def golden_cases(*methods: str) -> list[Any]:
    """The goldens of some methods, as pytest parameters."""
    cases = json.loads(GOLDENS.read_text())["goldens"]
    return [pytest.param(case, id=case["id"]) for case in cases if case["method"] in methods]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `goldens("name", ...)` runs once per case, as its argument `case`."""
    if markers := list(metafunc.definition.iter_markers("goldens")):
        metafunc.parametrize("case", golden_cases(*(name for marker in markers for name in marker.args)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "goldens(*methods): run once per golden case of these methods")


@pytest.fixture
def merge() -> Callable[..., torch.Tensor]:
    """`merge(setting, base, deltas)`: one tensor through a method, the setting completed first."""

    def run(
        setting: Setting,
        base: torch.Tensor,
        deltas: list[torch.Tensor | None],
        *,
        seeds: tuple[int, ...] = (),
        chunk: int = CHUNK,
        **fields: Any,
    ) -> torch.Tensor:
        method = METHODS[setting.method]
        inputs = TensorInputs(
            base=base.reshape(-1),
            deltas=[None if delta is None else delta.reshape(-1) for delta in deltas],
            setting=method.spec.complete(setting, "test"),
            dtype=base.dtype,
            shape=tuple(base.shape),
            seeds=seeds,
            chunk=chunk,
            **fields,
        )
        return method.merge(inputs)

    return run
