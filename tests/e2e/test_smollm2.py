"""The real language model: SmolLM2-135M-Instruct and its three committed experts, end to end.

The experts were trained by examples/smollm2/train_experts.py; the thresholds below are far under what its
README reports, so that they fail when something is broken and not when a sum is rounded otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evomerge
from evomerge.build import Parts, family_of
from evomerge.config import load_config
from evomerge.engine.factory import transformers_engine
from evomerge.engine.transformers_engine import TransformersEngine
from evomerge.evaluate.evaluator import evaluate, subset
from evomerge.evaluate.score import score_tasks
from evomerge.export.bundle import export_model
from evomerge.recipe import Recipe, Setting

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def parts() -> Parts:
    if not (ROOT / "examples/smollm2/base/model.safetensors").exists():
        pytest.fail("the base model is missing; run `python examples/smollm2/base.py` (make test does)")
    return Parts.open(load_config(ROOT / "runs" / "demo.yaml"))


@pytest.fixture(scope="module")
def engine(parts: Parts) -> Iterator[TransformersEngine]:
    made = transformers_engine(parts.sources, parts.layout)
    assert isinstance(made, TransformersEngine)
    yield made
    made.close()


def everywhere(parts: Parts, method: str, models: dict[str, dict[str, float]]) -> Recipe:
    family = family_of(parts.sources, parts.layout)
    return family.recipe(dict.fromkeys(family.layout.by_cell, Setting(method, {}, models)))


@pytest.mark.parametrize("expert", ["math", "spanish", "extract"])
def test_each_expert_masters_its_own_task_and_no_other_expert_does(
    parts: Parts, engine: TransformersEngine, expert: str
):
    engine.load(everywhere(parts, "task_arithmetic", {expert: {"weight": 1.0}}))
    scores = score_tasks(evaluate(engine, parts.suite, subset(parts.suite, "selection", 16)))
    assert scores[expert].mean >= 0.6
    assert all(scores[other].mean <= 0.3 for other in ("math", "spanish", "extract") if other != expert)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_the_exported_model_is_what_the_engine_held(
    parts: Parts, engine: TransformersEngine, method: str, tmp_path: Path
):
    """Promise 1 on the real model, random masks included."""
    models = {name: {"weight": 0.6, "density": 0.4} for name in parts.sources.models}
    recipe = everywhere(parts, method, models)
    engine.load(recipe)
    folder = export_model(
        tmp_path / "model", recipe, parts.sources, parts.layout, max_shard_bytes=100_000_000
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    written: dict[str, torch.Tensor] = {}
    for shard in set(index["weight_map"].values()):
        written |= load_file(folder / shard)
    held = dict(engine.tensors())
    assert held.keys() == written.keys()
    assert all(torch.equal(held[name].to(tensor.dtype), tensor) for name, tensor in written.items())


def test_a_short_run_ends_with_a_proven_and_exported_winner(tmp_path: Path):
    data = yaml.safe_load((ROOT / "runs" / "demo.yaml").read_text(encoding="utf-8"))
    data["items"] = {"calibration": 3, "selection": 2, "held_out": 2}
    data["budget"] = {"trials": 16}
    data["fixed"] = {"scales": [0.5], "subset_scales": [0.7], "screen_items": 2, "promote": 1}
    data["search"] = {"population_size": 4}
    data["selection"] = {"top": 1}
    data["export"] = {"model": False}
    data["engine"] = {"kind": "transformers"}
    data["fitness"] = str(ROOT / "fitness" / "spanish_math.yaml")
    example = ROOT / "examples" / "smollm2"
    data["base_model"] = str(example / "base")
    data["models"] = {name: {"adapter": str(example / "adapters" / name)} for name in data["models"]}
    run_file = tmp_path / "short.yaml"
    run_file.write_text(yaml.safe_dump(data), encoding="utf-8")
    result = evomerge.run_search(run_file)
    assert {"base", "math", "spanish", "extract", "uniform average"} <= {e.label for e in result.entries}
    scores, _ = evomerge.evaluate_model(
        tmp_path / "short" / "best" / "recipe.yaml",
        data["fitness"],
        split="held_out",
        limit=2,
        engine="transformers",
    )
    assert {task: s.mean for task, s in scores.items()} == {
        task: s.mean for task, s in (result.winner.tasks or {}).items()
    }
