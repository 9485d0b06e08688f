"""The exported folder: its card, what its weights say of themselves, and the notes for the user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evomerge.export.bundle import base_dtype, export_model, export_recipe, model_card
from evomerge.export.recipe_file import read_recipe
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests.export.conftest import weights_of
from tests.tiny import tiny_model


def recipe_of(method: str, *models: str) -> Recipe:
    values = {"weight": 0.5, **({"density": 0.5} if "dare" in method else {})}
    setting = Setting(method, {}, dict.fromkeys(models, values))
    return Recipe("base", ("math", "code", "far", "lora", "odd"), {Cell(0, "mlp"): setting})


def test_weights_carry_the_recipes_digest(family: SourceSet, tmp_path: Path):
    recipe = recipe_of("task_arithmetic", "math", "lora")
    out = export_model(tmp_path / "out", recipe, family, family.layout(), max_shard_bytes=10**9)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "evomerge_recipe": recipe.digest}


def test_tied_embeddings_are_written_once(family: SourceSet, tmp_path: Path):
    recipe = recipe_of("task_arithmetic", "math")
    out = export_model(tmp_path / "out", recipe, family, family.layout(), max_shard_bytes=10**9)
    assert "lm_head.weight" not in weights_of(out)
    assert Checkpoint(out).config["tie_word_embeddings"]


def test_the_card_names_sources_and_holds_the_recipe(family: SourceSet, tmp_path: Path):
    recipe = recipe_of("task_arithmetic", "math", "lora")
    out = export_model(tmp_path / "name", recipe, family, family.layout(), max_shard_bytes=10**9)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\n# name\n" in card
    for name in family.folders:
        assert f"- `{name}`: {family.folders[name].resolve()}\n" in card
    (tmp_path / "recipe.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
    assert read_recipe(tmp_path / "recipe.yaml")[0] == recipe


def test_the_card_shows_a_runs_outcome(family: SourceSet):
    assert "\n## Scores\n\nbetter by 3\n" in model_card(
        "m", recipe_of("linear", "math"), family, "better by 3\n"
    )


def test_a_wider_dtype_keeps_what_rounding_to_the_bases_would_lose(family: SourceSet, tmp_path: Path):
    recipe = recipe_of("task_arithmetic", "math")
    options = {"max_shard_bytes": 10**9, "dtype": "float32"}
    out = export_model(tmp_path / "out", recipe, family, family.layout(), **options)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = family.base_tensor(name).float() + 0.5 * family.delta("math", name)
    merged = weights_of(out)[name]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-7)
    assert Checkpoint(out).config["dtype"] == "float32"


def test_a_merge_whose_source_was_replaced_does_not_go_on_with_old_shards(tmp_path: Path):
    base = tiny_model(tmp_path / "base")
    math = tiny_model(tmp_path / "math", seed=1, noise_from=base)
    refs = {"math": SourceRef(model=str(math))}
    before = SourceSet.open(SourceRef(model=str(base)), refs).stamp()
    tiny_model(tmp_path / "math", seed=2, noise_from=base)
    os.utime(math / "model.safetensors", (1.0, 1.0))  # both may be written within one tick of the clock
    assert SourceSet.open(SourceRef(model=str(base)), refs).stamp() != before


@pytest.fixture
def mixed(tmp_path: Path) -> SourceSet:
    """A bfloat16 model whose norms are stored in float32."""
    folder = tiny_model(tmp_path / "base")
    tensors = {
        name: tensor.float() if "norm" in name else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expert = tiny_model(tmp_path / "math", 1, noise_from=folder)
    return SourceSet.open(SourceRef(model=str(folder)), {"math": SourceRef(model=str(expert))})


def test_the_dtype_of_a_base_is_that_of_most_of_its_bytes(mixed: SourceSet):
    assert base_dtype(mixed) == "bfloat16"


def test_every_tensor_keeps_its_dtype(mixed: SourceSet, tmp_path: Path):
    recipe = Recipe("base", ("math",), {Cell(0, "norm"): Setting("linear", {}, {"math": {"weight": 1.0}})})
    out = export_model(tmp_path / "out", recipe, mixed, mixed.layout(), max_shard_bytes=10**9)
    dtypes = {name: tensor.dtype for name, tensor in weights_of(out).items()}
    assert dtypes["model.layers.0.input_layernorm.weight"] == torch.float32
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16


def export_notes(
    folder: Path, recipe: Recipe, sources: SourceSet, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """`export_recipe` of a run whose outcome is of no interest here."""
    monkeypatch.setattr("evomerge.export.bundle.headline", lambda result: "A headline.")
    monkeypatch.setattr("evomerge.export.bundle.scores_of", lambda result: {"calibration": 0.25})
    return export_recipe(folder, recipe, sources, sources.layout(), None)  # type: ignore[arg-type]


def test_both_recipes_are_written(family: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of("task_arithmetic", "math")
    assert export_notes(tmp_path / "best", recipe, family, monkeypatch) == []
    assert read_recipe(tmp_path / "best" / "recipe.yaml")[0] == recipe
    text = (tmp_path / "best" / "recipe.yaml").read_text()
    assert text.startswith("# A headline.\n# Merge with: evomerge merge recipe.yaml OUT\n")
    assert "calibration: 0.25" in text
    assert "merge_method: task_arithmetic" in (tmp_path / "best" / "mergekit.yaml").read_text()


def test_random_masks_are_a_note(family: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (note,) = export_notes(tmp_path / "best", recipe_of("dare_linear", "math"), family, monkeypatch)
    assert "other random masks" in note


def test_a_base_of_two_dtypes_is_a_note_and_a_comment(
    mixed: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = Recipe("base", ("math",), {})
    (note,) = export_notes(tmp_path / "best", recipe, mixed, monkeypatch)
    assert "in bfloat16 and in float32, but mergekit writes bfloat16 only" in note
    assert f"# {note}\n" in (tmp_path / "best" / "mergekit.yaml").read_text()


def test_a_recipe_that_mergekit_cannot_run_leaves_no_old_file(
    family: SourceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export_notes(tmp_path / "best", recipe_of("task_arithmetic", "math"), family, monkeypatch)
    cells = dict(recipe_of("linear", "odd").cells) | {
        Cell(1, "mlp"): Setting("slerp", {"t": 0.5}, {"far": {}})
    }
    (note,) = export_notes(tmp_path / "best", Recipe("base", family.models, cells), family, monkeypatch)
    assert "`odd`" in note
    assert not (tmp_path / "best" / "mergekit.yaml").exists()
