"""Shared by the tests of the merge side: goldens, and inputs for a method."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Given(NamedTuple):
    """Statistics of one tensor, which is the whole model, in the models' order."""

    rows: Sequence[torch.Tensor | None]

    def __call__(self, index: int, kind: str) -> torch.Tensor | None:
        return self.rows[index]

    def rms(self, index: int, kind: str) -> float:
        row = self.rows[index]
        return 0.0 if row is None else float(row.double().square().mean().sqrt())


def drawn_statistics(setting: Setting, base: torch.Tensor, kind: str) -> list[torch.Tensor | None]:
    """Depend on the model's name only; a tensor that is no matrix has no Gram matrix."""
    rows: list[torch.Tensor | None] = []
    for model in setting.models:
        generator = torch.Generator().manual_seed(sum(model.encode()))
        if kind == "gram":
            k = base.shape[-1]
            x = torch.randn(2 * k, k, generator=generator, dtype=base.dtype) if base.dim() == 2 else None
            rows.append(None if x is None else x.mT @ x / len(x))
        else:
            rows.append(torch.randn(base.shape, generator=generator, dtype=base.dtype).square())
    return rows


@pytest.fixture
def merge() -> Callable[..., torch.Tensor]:
    """`merge(setting, base, deltas)`: one tensor through a method, the setting completed first.

    Models of a method that needs statistics carry drawn ones, unless `statistics` are given.
    """

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
        if method.spec.needs is not None and "statistics" not in fields:
            fields["statistics"] = Given(drawn_statistics(setting, base, method.spec.needs))
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
