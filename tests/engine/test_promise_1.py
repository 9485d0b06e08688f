"""Promise 1: the exported folder holds, tensor by tensor, what the engine held when it scored the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.engine.transformers_engine import TransformersEngine
from evomerge.export.bundle import export_model
from evomerge.merge.merger import Merger
from evomerge.recipe import Recipe, Setting
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests.threads import one_thread as one_thread
from tests.tiny import tiny_adapter, tiny_model

SPARSE = {"math": {"weight": 0.6, "density": 0.4}, "lora": {"weight": 0.9, "density": 0.7}}
SETTINGS = {
    "task_arithmetic": Setting(
        "task_arithmetic", {}, {m: {"weight": v["weight"]} for m, v in SPARSE.items()}
    ),
    "ties": Setting("ties", {"lambda": 0.8}, SPARSE),
    "dare_linear": Setting("dare_linear", {}, SPARSE),
    "dare_ties": Setting("dare_ties", {}, SPARSE),
}
TOKENS = torch.tensor([[5, 17, 99, 40, 8, 63, 101, 3]])


@pytest.fixture(scope="module", params=["tied", "untied"])
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    home = tmp_path_factory.mktemp(request.param)
    base = tiny_model(home / "base", tied=request.param == "tied")
    models = {
        "math": SourceRef(model=str(tiny_model(home / "math", 1, noise_from=base))),
        "lora": SourceRef(adapter=str(tiny_adapter(home / "lora", base, 2))),
    }
    return SourceSet.open(SourceRef(model=str(base)), models)


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request: pytest.FixtureRequest, sources: SourceSet) -> Iterator[TransformersEngine]:
    """With a cache and a history of other candidates, as in a search; the export has neither.

    The checkpoints are bfloat16: an engine in float32 holds their values, not more exact ones.
    """
    merger, folder = Merger(sources, cache_bytes=10**8), sources.folders["base"]
    engine = TransformersEngine(folder, merger, sources.layout(), device="cpu", dtype=request.param)
    yield engine
    engine.close()


def recipe_of(sources: SourceSet, method: str) -> Recipe:
    """The method everywhere but in the norms, which keep the base."""
    cells = [cell for cell in sources.layout().by_cell if cell.module != "norm"]
    return Recipe("base", sources.models, dict.fromkeys(cells, SETTINGS[method]), seed=11)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("method", list(SETTINGS))
def test_the_exported_folder_equals_what_the_engine_held(
    engine: TransformersEngine, sources: SourceSet, method: str, tmp_path: Path
):
    recipe = recipe_of(sources, method)
    engine.load(recipe)
    torch.rand(7)  # nothing may depend on the global generator
    out = export_model(tmp_path / "out", recipe, sources, sources.layout(), max_shard_bytes=10**9)
    held, exported = dict(engine.tensors()), load_file(out / "model.safetensors")
    assert set(exported) == set(held)
    assert [name for name in held if not torch.equal(held[name].float(), exported[name].float())] == []
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    base = {name: sources.base_tensor(name) for name in held}
    assert sum(not torch.equal(exported[name], base[name]) for name in held) > len(held) // 2


@pytest.mark.parametrize("method", list(SETTINGS))
def test_the_exported_folder_gives_the_engines_logits(
    engine: TransformersEngine, sources: SourceSet, method: str, tmp_path: Path
):
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(sources, method)
    engine.load(recipe)
    out = export_model(tmp_path / "out", recipe, sources, sources.layout(), max_shard_bytes=100_000)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=engine.model.dtype).eval()
    assert torch.equal(logits_of(model), logits_of(engine.model))
