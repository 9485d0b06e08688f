"""vLLM and transformers on the real model: the same candidate gives the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.build import Parts
from evomerge.config import load_config
from evomerge.engine import vllm_compat
from evomerge.engine.base import Engine, LikelihoodRequest
from evomerge.engine.factory import open_engine
from evomerge.evaluate.evaluator import generate_request, subset
from evomerge.recipe import Setting

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not vllm_compat.installed(), reason="vLLM is not installed; `make test` installs it"),
]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts.open(load_config(ROOT / "runs" / "demo.yaml"))


@pytest.fixture(scope="module")
def engines(parts: Parts) -> Iterator[list[Engine]]:
    both = [
        open_engine(parts.sources, parts.layout, kind=kind, dtype="float32", cache_gb=1.5, options=options)
        for kind, options in (
            ("vllm", {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 29}),
            ("transformers", None),
        )
    ]
    models = {model: {"weight": 0.6, "density": 0.5} for model in parts.sources.models}
    recipe = parts.family.recipe(dict.fromkeys(parts.layout.by_cell, Setting("ties", {}, models)))
    for engine in both:
        engine.load(recipe)
    yield both
    for engine in both:
        engine.close()


def test_greedy_answers_in_float32_are_equal_item_by_item(parts: Parts, engines: list[Engine]):
    requests = [
        generate_request(parts.suite.tasks[item.task], item) for item in subset(parts.suite, "calibration", 8)
    ]
    ours, theirs = (engine.generate(requests) for engine in engines)
    assert ours == theirs


def test_loglikelihoods_in_float32_agree_to_a_thousandth_of_a_nat(parts: Parts, engines: list[Engine]):
    requests = [
        LikelihoodRequest(item.prompt, f" {item.answer}", chat=True)
        for item in subset(parts.suite, "calibration", 4)
    ]
    ours, theirs = (engine.loglikelihood(requests) for engine in engines)
    assert [each.tokens for each in ours] == [each.tokens for each in theirs]
    assert [each.total for each in ours] == pytest.approx([each.total for each in theirs], abs=1e-3)
