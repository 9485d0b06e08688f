"""Merging and answering on a CUDA device gives what the CPU gives. Not yet run on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.build import family_of
from evomerge.engine.base import GenerateRequest
from evomerge.engine.factory import transformers_engine
from evomerge.merge.mask import keep_mask
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Recipe, Setting
from evomerge.sources.source_set import SourceSet
from tests.tiny import tiny_family

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    return tiny_family(tmp_path_factory.mktemp("sources"))


def recipe(sources: SourceSet, method: str) -> Recipe:
    family = family_of(sources, sources.layout())
    usual = {"weight": 0.6, "density": 0.5}
    values = {key: usual[key] for key in SPECS[method].per_model if key in usual}
    shared = {"t": 0.01} if "t" in SPECS[method].shared else {}
    models = sources.models[: SPECS[method].max_models]
    setting = Setting(method, shared, {name: values for name in models})
    return family.recipe(dict.fromkeys(family.layout.by_cell, setting))


def test_masks_are_those_of_the_cpu():
    assert torch.equal(keep_mask(7, 0.3, 100_003, device="cuda").cpu(), keep_mask(7, 0.3, 100_003))


@pytest.mark.parametrize("method", SPECS)
def test_the_device_merges_what_the_cpu_merges(sources: SourceSet, method: str):
    plan = MergePlan.compile(recipe(sources, method), sources.layout(), SPECS)
    on_cpu = dict(Merger(sources).materialize(plan))
    for name, tensor in Merger(sources, device="cuda").materialize(plan):
        torch.testing.assert_close(tensor.cpu(), on_cpu[name], rtol=2**-7, atol=1e-6)


def test_the_device_answers_what_the_cpu_answers_in_float32(sources: SourceSet, tmp_path: Path):
    requests = [GenerateRequest(prompt, 6) for prompt in ("a b c", "a", "d e f g h")]
    answers = []
    for device in ("cpu", "cuda"):
        engine = transformers_engine(sources, sources.layout(), device=device, dtype="float32", cache_gb=0.1)
        engine.load(recipe(sources, "task_arithmetic"))
        answers.append(engine.generate(requests))
        engine.close()
    assert answers[0] == answers[1]
