"""Source sets: task vectors of checkpoints and adapters, what is said of them, and tied embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import CompatibilityError, SourceError
from evomerge.recipe import Cell
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from evomerge.sources.streamed import from_held
from tests.tiny import VOCAB, tiny_adapter, tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, bfloat16."""
    return tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def open_set(base: Path, **models: Path) -> SourceSet:
    """Folders with an adapter_config.json become adapters."""
    refs = {
        name: SourceRef(adapter=str(path))
        if (path / "adapter_config.json").exists()
        else SourceRef(model=str(path))
        for name, path in models.items()
    }
    return SourceSet.open(SourceRef(model=str(base)), refs)


def edit(folder: Path, change: Mapping[str, torch.Tensor]) -> Path:
    """Replace or add tensors of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({**tensors, **change}, file)
    return folder


def test_adapters_and_full_models_mix(base: Path, tmp_path: Path):
    sources = open_set(
        base,
        full=tiny_model(tmp_path / "full", seed=1, noise_from=base),
        lora=tiny_adapter(tmp_path / "lora", base),
    )
    assert sources.models == ("full", "lora")
    assert set(sources.tensor_names) == set(load_file(base / "model.safetensors"))
    assert all(sources.delta("full", name) is not None for name in sources.tensor_names)
    changed = {name for name in sources.tensor_names if sources.delta("lora", name) is not None}
    modules = {name.split(".")[-2] for name in changed}
    assert (len(changed), modules) == (6, {"q_proj", "v_proj", "down_proj"})


def test_the_delta_of_a_full_model_is_the_float32_difference(base: Path, tmp_path: Path):
    tuned = tiny_model(tmp_path / "tuned", seed=1, noise_from=base)
    delta = open_set(base, tuned=tuned).delta("tuned", Q_PROJ)
    theta, start = (load_file(folder / "model.safetensors")[Q_PROJ] for folder in (tuned, base))
    assert delta is not None
    assert delta.dtype == torch.float32
    assert torch.equal(delta, theta.float() - start.float())


def test_an_equal_tensor_has_no_delta(base: Path, tmp_path: Path):
    tuned = tiny_model(tmp_path / "tuned", seed=1, noise_from=base)
    edit(tuned, {Q_PROJ: load_file(base / "model.safetensors")[Q_PROJ]})
    sources = open_set(base, tuned=tuned)
    assert sources.may_change("tuned", Q_PROJ)
    assert sources.delta("tuned", Q_PROJ) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_held_is_the_delta_and_half_as_large_where_model_and_base_have_16_bits(dtype, tmp_path: Path):
    start = (torch.arange(64 * 64).reshape(64, 64) / 4096).to(dtype)
    base = edit(tiny_model(tmp_path / "base"), {Q_PROJ: start})
    tuned = edit(tiny_model(tmp_path / "tuned"), {Q_PROJ: start * 2})
    wide = edit(tiny_model(tmp_path / "wide"), {Q_PROJ: start.double() + 1})
    same = edit(tiny_model(tmp_path / "same"), {Q_PROJ: start})
    sources = open_set(base, tuned=tuned, wide=wide, same=same, lora=tiny_adapter(tmp_path / "lora", base))
    flat = start.reshape(-1)
    for model, own in [("tuned", dtype), ("wide", torch.float32), ("lora", torch.float32)]:
        held, delta = sources.held(model, Q_PROJ, flat), sources.delta(model, Q_PROJ)
        assert held is not None
        assert held.dtype == own
        assert torch.equal(from_held(held, flat)[:], delta.reshape(-1))
    assert sources.held("same", Q_PROJ, flat) is None


def test_a_model_in_another_dtype_is_compared_by_value(base: Path, tmp_path: Path):
    copy = tiny_model(tmp_path / "copy")
    edit(copy, {Q_PROJ: load_file(base / "model.safetensors")[Q_PROJ].float()})
    assert open_set(base, copy=copy).delta("copy", Q_PROJ) is None


def test_may_change_is_true_wherever_an_adapter_has_a_delta(base: Path, tmp_path: Path):
    sources = open_set(base, lora=tiny_adapter(tmp_path / "lora", base))
    for name in sources.tensor_names:
        assert sources.may_change("lora", name) == (sources.delta("lora", name) is not None)


def test_tensors_that_are_not_floating_point_are_left_alone(tmp_path: Path):
    base = edit(tiny_model(tmp_path / "base"), {"model.steps": torch.tensor([1])})
    other = edit(tiny_model(tmp_path / "other"), {"model.steps": torch.tensor([2])})
    sources = open_set(base, other=other)
    assert not sources.may_change("other", "model.steps")
    assert sources.delta("other", "model.steps") is None


def test_the_layout_is_that_of_the_base(base: Path):
    sources = open_set(base)
    layout = sources.layout({"query": [r"q_proj"]})
    assert layout.n_layers == 2
    assert layout.cell(Q_PROJ) == Cell(0, "query")
    assert layout.tensors == sources.tensor_names


def test_hashes_are_those_of_the_files(base: Path, tmp_path: Path):
    tuned = tiny_model(tmp_path / "tuned", seed=1, noise_from=base)
    expected = {
        name: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for name, folder in (("base", base), ("tuned", tuned))
    }
    assert open_set(base, tuned=tuned).hashes() == expected


def test_the_description_is_json_with_one_row_per_source(base: Path, tmp_path: Path):
    lora = tiny_adapter(tmp_path / "lora", base, r=4, targets=("q_proj",))
    rows = json.loads(json.dumps(open_set(base, lora=lora).describe()))
    assert [(row["name"], row["kind"], row["source"]) for row in rows] == [
        ("base", "base", str(base)),
        ("lora", "adapter", str(lora)),
    ]
    # 2 layers of A (4, 64) and B (64, 4) in float32
    assert (rows[1]["parameters"], rows[1]["bytes"]) == (1024, 4096)
    assert rows[1]["revision"] is None


def test_the_base_is_a_full_model(base: Path, tmp_path: Path):
    with pytest.raises(SourceError, match=r"base `base`: `.*` is an adapter; give a full model"):
        SourceSet.open(SourceRef(adapter=str(tiny_adapter(tmp_path / "lora", base))), {})


def test_no_model_has_the_name_of_the_base(base: Path):
    with pytest.raises(SourceError, match="model `base` has the name of the base"):
        SourceSet.open(SourceRef(model=str(base)), {"base": SourceRef(model=str(base))})


def test_an_unreadable_source_is_named(base: Path, tmp_path: Path):
    tuned = tiny_model(tmp_path / "tuned", seed=1, noise_from=base)
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"model `tuned`: `.*model\.safetensors` is truncated"):
        open_set(base, tuned=tuned)


def test_a_tied_base_that_stores_its_head_lists_it_once(base: Path, tmp_path: Path):
    folder = tiny_model(tmp_path / "base")
    edit(folder, {HEAD: load_file(folder / "model.safetensors")[EMBEDDING].clone()})
    sources = open_set(folder, plain=tiny_model(tmp_path / "plain", seed=1, noise_from=base))
    assert HEAD not in sources.tensor_names
    assert EMBEDDING in sources.tensor_names


def test_a_tied_base_with_two_matrices_is_refused(tmp_path: Path):
    folder = edit(tiny_model(tmp_path / "base"), {HEAD: torch.zeros(VOCAB, 64, dtype=torch.bfloat16)})
    with pytest.raises(
        CompatibilityError, match=r"base `base`: `lm_head\.weight` differs from `model\.embed"
    ):
        open_set(folder)


def test_a_model_that_stores_a_copy_of_the_tied_embedding_is_taken(base: Path, tmp_path: Path):
    tuned = tiny_model(tmp_path / "tuned", seed=1, noise_from=base)
    edit(tuned, {HEAD: load_file(tuned / "model.safetensors")[EMBEDDING].clone()})
    delta = open_set(base, tuned=tuned).delta("tuned", EMBEDDING)
    assert delta is not None
    assert delta.abs().max() > 0


def test_a_model_that_unties_the_embedding_is_refused(base: Path, tmp_path: Path):
    tuned = tiny_model(tmp_path / "tuned", tied=False)
    with pytest.raises(
        CompatibilityError, match=r"model `tuned`: `lm_head\.weight` differs .* the base ties the two"
    ):
        open_set(base, tuned=tuned)


def test_a_tied_model_of_an_untied_base_is_refused(base: Path, untied: Path):
    with pytest.raises(
        CompatibilityError, match=r"model `tied`: it ties its embeddings, but the base stores `lm_head"
    ):
        open_set(untied, tied=base)


def test_an_adapter_of_the_embedding_alone_is_refused_on_a_tied_base(base: Path, tmp_path: Path):
    lora = tiny_adapter(tmp_path / "lora", base, targets=("embed_tokens", "q_proj"))
    with pytest.raises(
        CompatibilityError, match=r"changes `model\.embed_tokens\.weight` alone.*`ensure_weight_tying`"
    ):
        open_set(base, lora=lora)


def test_an_adapter_of_the_head_alone_is_refused_on_a_tied_base(base: Path, tmp_path: Path):
    lora = tiny_adapter(tmp_path / "lora", base, full={HEAD: torch.zeros(VOCAB, 64)})
    with pytest.raises(CompatibilityError, match=r"changes `lm_head\.weight` alone"):
        open_set(base, lora=lora)


def test_a_tied_embedding_trained_in_full_without_its_head_is_refused(base: Path, tmp_path: Path):
    start = load_file(base / "model.safetensors")[EMBEDDING].float()
    lora = tiny_adapter(tmp_path / "lora", base, full={EMBEDDING: start + 1})
    with pytest.raises(CompatibilityError, match=r"changes `model\.embed_tokens\.weight` alone"):
        open_set(base, lora=lora)


def test_a_tied_embedding_trained_in_full_twice_alike_is_one_delta(base: Path, tmp_path: Path):
    start = load_file(base / "model.safetensors")[EMBEDDING].float()
    lora = tiny_adapter(tmp_path / "lora", base, full={EMBEDDING: start + 1, HEAD: start + 1})
    delta = open_set(base, lora=lora).delta("lora", EMBEDDING)
    assert delta is not None
    assert torch.equal(delta, (start + 1) - start)


def test_a_tied_embedding_trained_in_full_twice_apart_is_refused(base: Path, tmp_path: Path):
    start = load_file(base / "model.safetensors")[EMBEDDING].float()
    lora = tiny_adapter(tmp_path / "lora", base, full={EMBEDDING: start + 1, HEAD: start + 2})
    with pytest.raises(CompatibilityError, match="each for itself"):
        open_set(base, lora=lora)


def test_an_embedding_saved_unchanged_is_no_change_of_a_tied_base(base: Path, tmp_path: Path):
    start = load_file(base / "model.safetensors")[EMBEDDING]
    sources = open_set(base, lora=tiny_adapter(tmp_path / "lora", base, full={EMBEDDING: start.clone()}))
    assert sources.delta("lora", EMBEDDING) is None


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_embedding_adapter_that_peft_kept_tied_is_that_of_peft(tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_model(tmp_path / "base", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    embedded = model(torch.arange(VOCAB)[None], output_hidden_states=True).hidden_states[0][0]
    sources = open_set(base, lora=tmp_path / "lora")
    delta = sources.delta("lora", EMBEDDING)
    assert delta is not None
    torch.testing.assert_close(sources.base_tensor(EMBEDDING) + delta, embedded, rtol=0, atol=1e-6)
