"""Models that could not be merged are inspected as far as they go, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ConfigError, SourceError
from evomerge.inspect.inspection import Inspection, inspect_models
from evomerge.inspect.tables import as_json, problem_lines
from tests.tiny import tiny_adapter, tiny_model

EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "base")


def norm(model: Path, base: Path, leave_out: set[str]) -> float:
    """L2 norm of the task vector over the tensors that both have."""
    mine, its = (load_file(folder / "model.safetensors") for folder in (model, base))
    parts = [(mine[name].double() - its[name].double()).flatten() for name in its if name not in leave_out]
    return float(np.linalg.norm(torch.cat(parts).numpy()))


def test_a_larger_vocabulary_leaves_out_the_embedding_alone(base: Path, tmp_path: Path):
    big = tiny_model(tmp_path / "big", seed=1, vocab=160)
    (model,) = inspect_models(base, {"big": big}).models
    assert model.skipped == {EMBEDDING: "has shape (160, 64), base has (128, 64)"}
    assert "its vocabulary has 160 entries" in str(model.problem)
    assert model.total.norm == pytest.approx(norm(big, base, {EMBEDDING}), rel=1e-7)


def test_missing_and_foreign_tensors_are_named(base: Path, tmp_path: Path):
    shallow, deep = (tiny_model(tmp_path / f"{n}", layers=n) for n in (1, 3))
    models = inspect_models(base, {"shallow": shallow, "deep": deep}).models
    assert set(models[0].skipped.values()) == {"is missing"}
    assert set(models[1].skipped.values()) == {"is not in the base"}
    assert all(name.startswith("model.layers.1.") for name in models[0].skipped)
    assert all(name.startswith("model.layers.2.") for name in models[1].skipped)


def test_a_pair_is_compared_where_both_models_can_be(base: Path, tmp_path: Path):
    models = {
        "big": tiny_model(tmp_path / "big", seed=1, vocab=160),
        "shallow": tiny_model(tmp_path / "shallow", seed=2, layers=1),
    }
    (pair,) = inspect_models(base, models).pair_totals.values()
    tensors = load_file(models["shallow"] / "model.safetensors")
    assert pair.entries == sum(tensor.numel() for name, tensor in tensors.items() if name != EMBEDDING)


def test_a_model_with_nan_is_measured_without_that_tensor(base: Path, tmp_path: Path):
    broken = tiny_model(tmp_path / "broken", seed=1, noise_from=base)
    tensors = load_file(broken / "model.safetensors")
    tensors[Q_PROJ][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    inspection = inspect_models(base, {"broken": broken, "sound": tiny_model(tmp_path / "sound", seed=2)})
    broken_row, sound = inspection.models
    assert broken_row.skipped == {Q_PROJ: "holds NaN or infinite entries"}
    assert sound.skipped == {}
    assert sound.total.entries - broken_row.total.entries == 64 * 64
    assert inspection.pair_totals["broken", "sound"].entries == broken_row.total.entries


def test_an_adapter_for_a_wider_base_is_left_out_where_it_does_not_fit(base: Path, tmp_path: Path):
    wide = tiny_model(tmp_path / "wide", hidden=128)
    lora = tiny_adapter(tmp_path / "lora", wide, targets=("q_proj",))
    (model,) = inspect_models(base, {"lora": lora}).models
    assert "the adapter is for another base" in str(model.problem)
    assert len(model.skipped) == 2
    assert model.total.changed == 0


def test_an_adapter_for_a_deeper_base_names_the_foreign_tensors(base: Path, tmp_path: Path):
    deep = tiny_model(tmp_path / "deep", layers=3)
    lora = tiny_adapter(tmp_path / "lora", deep, targets=("q_proj",))
    (model,) = inspect_models(base, {"lora": lora}).models
    assert model.skipped == {"model.layers.2.self_attn.q_proj.weight": "is not in the base"}
    assert model.total.changed > 0


def test_a_tensor_stored_as_integers_is_left_out(base: Path, tmp_path: Path):
    folder = tiny_model(tmp_path / "int8", seed=1, noise_from=base)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    (model,) = inspect_models(base, {"int8": folder}).models
    assert model.skipped == {"model.norm.weight": "is stored as I8, which cannot be merged"}


def test_a_base_that_cannot_be_merged_is_said(base: Path, tmp_path: Path):
    folder = tiny_model(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(128, 64)}, folder / "model.safetensors")
    inspection = inspect_models(folder, {"one": tiny_model(tmp_path / "one", seed=1)})
    assert problem_lines(inspection)[0].startswith("base cannot be merged: `lm_head.weight` differs from")


def test_many_skipped_tensors_are_counted_and_the_first_named(base: Path, tmp_path: Path):
    inspection = inspect_models(base, {"shallow": tiny_model(tmp_path / "shallow", layers=1)})
    line = problem_lines(inspection)[1]
    assert line.startswith("shallow: 9 tensors left out of its numbers: `model.layers.1.")
    assert line.endswith("; and 6 more")
    assert len(as_json(inspection)["models"][0]["skipped"]) == 9


def test_a_place_that_is_not_there_is_refused(base: Path, tmp_path: Path):
    with pytest.raises(SourceError, match=r"model `gone`: folder `.*gone` does not exist"):
        inspect_models(base, {"gone": tmp_path / "gone"})


def test_no_model_at_all_is_refused(base: Path):
    with pytest.raises(ConfigError, match="no model is given"):
        inspect_models(base, {})


def test_a_model_that_fits_has_no_problem(base: Path, tmp_path: Path):
    inspection: Inspection = inspect_models(base, {"one": tiny_model(tmp_path / "one", 1, noise_from=base)})
    assert problem_lines(inspection) == []
