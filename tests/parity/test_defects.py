"""Where mergekit 0.1.5 fails, or is silent, what we do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.export.bundle import buffer_notes, export_model, rank_notes
from evomerge.export.mergekit import mergekit_documents, mergekit_text, places
from evomerge.merge.methods import SPECS
from evomerge.model import merge_model
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests.export.conftest import weights_of
from tests.parity.conftest import World


def test_a_mistyped_parameter_changes_nothing_in_mergekit_and_is_an_error_here(world: World, tmp_path: Path):
    theirs = world.cases["hand/mistyped"].theirs
    plain = world.cases["hand/plain"].theirs
    assert all(torch.equal(theirs[name], plain[name]) for name in plain)
    with pytest.raises(RecipeError, match="unknown parameter `lamda`; did you mean `lambda`"):
        merge_model(world.cases["hand/mistyped"].path, tmp_path / "out")


def test_a_density_beside_the_default_epsilon_is_refused_by_both(world: World, tmp_path: Path):
    assert "ValueError" in world.cases["hand/edge"].error
    with pytest.raises(RecipeError, match=r"epsilon is 0\.15.*change epsilon or density"):
        merge_model(world.cases["hand/edge"].path, tmp_path / "out")


def test_a_gpt_neox_adapter_fails_in_mergekit_and_the_export_says_so(world: World, tmp_path: Path):
    assert "attention.bias required but not present" in world.cases["hand/neox_adapter"].error
    merge_model(world.cases["hand/neox_adapter"].path, tmp_path / "out")
    sources = world.home.sources("neox-f32")
    (note,) = buffer_notes(sources)
    assert "refuses GPT-NeoX models without the buffers" in note
    assert buffer_notes(world.home.sources("llama-f32")) == []


def test_full_gpt_neox_models_with_their_buffers_need_no_note(world: World):
    sources = world.home.sources("neox-f32")
    base = SourceRef(model=str(sources.folders["base"]))
    near = SourceRef(model=str(sources.folders["near"]))
    assert buffer_notes(SourceSet.open(base, {"near": near})) == []


def test_della_on_rows_of_one_entry_fails_in_mergekit_and_the_export_says_so(world: World, tmp_path: Path):
    case = world.cases["hand/neox_della"]
    assert "Expected p_in >= 0" in case.error
    merge_model(case.path, tmp_path / "out")
    with pytest.raises(RecipeError, match="mergekit cannot rank rows of one entry"):
        merge_model(case.path, tmp_path / "replayed", mergekit_rng=1)
    sources = world.home.sources("neox-f32")
    setting = Setting("della", {}, {"near": {"weight": 0.5, "density": 0.5}})
    recipe = Recipe("base", sources.models, {Cell(0, "attention"): setting})
    (note,) = rank_notes(recipe, sources, sources.layout())
    assert "cannot merge `gpt_neox.layers.0.attention.masked_bias` by della" in note
    thinned = Recipe("base", sources.models, {Cell(0, "mlp"): setting})
    assert rank_notes(thinned, sources, sources.layout()) == []


def test_buffers_of_whole_numbers_are_copied_where_mergekit_casts_them(world: World, tmp_path: Path):
    """What mergekit makes of them is compared by value in the other tests."""
    sources = world.home.sources("neox-f32")
    recipe = Recipe("base", sources.models, {})
    export_model(tmp_path / "out", recipe, sources, sources.layout(), max_shard_bytes=10**9)
    name = "gpt_neox.layers.0.attention.bias"
    assert weights_of(tmp_path / "out")[name].dtype == torch.uint8


def test_multislerp_of_three_equal_tensors_stops_mergekit_and_is_that_tensor_here(
    world: World, tmp_path: Path
):
    case = world.cases["hand/unchanged"]
    assert "The weighted sum of the input tensors is zero" in case.error
    merged = weights_of(merge_model(case.path, tmp_path / "out"))
    sources = world.home.sources("neox-f32")
    name = "gpt_neox.layers.0.attention.masked_bias"
    assert torch.equal(merged[name], sources.base_tensor(name))
    setting = Setting("multislerp", {}, {model: {"weight": 1.0} for model in ("near", "parts", "far")})
    recipe = Recipe("base", sources.models, {Cell(0, "mlp"): setting})
    documents = mergekit_documents(recipe, sources.layout(), SPECS, places(sources), "float32")
    assert "multislerp: mergekit stops at a tensor" in mergekit_text(documents, SPECS)
