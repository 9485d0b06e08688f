"""Compatibility: each way in which a source can miss the base gives one line that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import CompatibilityError
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from evomerge.sources.tokenizer import difference, vocabulary
from tests.tiny import tiny_adapter, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "base")


def problem(base: Path, **models: SourceRef) -> str:
    """Message of the error that opening these raises."""
    with pytest.raises(CompatibilityError) as caught:
        SourceSet.open(SourceRef(model=str(base)), models)
    return str(caught.value)


def model(folder: Path) -> SourceRef:
    return SourceRef(model=str(folder))


def adapter(folder: Path) -> SourceRef:
    return SourceRef(adapter=str(folder))


def test_another_shape_names_model_tensor_and_both_shapes(base: Path, tmp_path: Path):
    wide = tiny_model(
        tmp_path / "wide", hidden=96, config={"num_attention_heads": 2, "num_key_value_heads": 2}
    )
    text = problem(base, wide=model(wide))
    assert text.startswith("model `wide`: tensor `model.")
    # header order is by name: the embedding comes first
    assert "tensor `model.embed_tokens.weight` has shape (128, 96), base has (128, 64)" in text


def test_another_number_of_layers_names_the_missing_tensors(base: Path, tmp_path: Path):
    text = problem(base, shallow=model(tiny_model(tmp_path / "shallow", layers=1)))
    assert "model `shallow`: it lacks 9 tensors (`model.layers.1.input_layernorm.weight`, ...)" in text
    text = problem(tmp_path / "shallow", deep=model(base))
    assert "model `deep`: it has, and the base lacks, 9 tensors (`model.layers.1.input_layernorm" in text


def test_another_vocabulary_size_names_both(base: Path, tmp_path: Path):
    text = problem(base, big=model(tiny_model(tmp_path / "big", vocab=130)))
    assert "model `big`: its vocabulary has 130 entries, the base's has 128" in text
    assert "`model.embed_tokens.weight` has shape (130, 64), base has (128, 64)" in text


def test_another_architecture_is_refused(base: Path, tmp_path: Path):
    other = tiny_model(tmp_path / "other", config={"model_type": "qwen3"})
    assert "model `other`: `model_type` is qwen3, the base's is llama" in problem(base, other=model(other))
    other = tiny_model(tmp_path / "other", config={"architectures": ["LlamaForSequenceClassification"]})
    assert "`architectures` is LlamaForSequenceClassification" in problem(base, other=model(other))


def test_another_number_of_heads_in_equal_shapes_is_refused(base: Path, tmp_path: Path):
    other = tiny_model(tmp_path / "other", config={"num_attention_heads": 4, "num_key_value_heads": 4})
    assert "`num_attention_heads` is 4, the base's is 2" in problem(base, other=model(other))


def test_a_tensor_stored_as_integers_is_refused(base: Path, tmp_path: Path):
    folder = tiny_model(tmp_path / "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert "tensor `model.norm.weight` is stored as I8" in problem(base, int8=model(folder))


def test_another_tokenizer_names_the_token(base: Path, tmp_path: Path):
    folder = tiny_model(tmp_path / "swapped", seed=1, noise_from=base)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    text = problem(base, swapped=model(folder))
    assert (
        "model `swapped`: its tokenizer is not the base's: token `B` has id 37, the base's has id 38" in text
    )


def test_a_token_more_or_less_is_another_tokenizer(base: Path, tmp_path: Path):
    more = tiny_model(tmp_path / "more", seed=1, noise_from=base)
    tiny_tokenizer(more, extra=("<think>",))
    assert "token `<think>` (id 128) is not in the base's" in problem(base, more=model(more))
    assert "token `<think>` (id 128) of the base is missing" in problem(more, less=model(base))


def test_another_chat_template_or_no_tokenizer_is_allowed(base: Path, tmp_path: Path):
    chat, bare = (tiny_model(tmp_path / name, seed=1, noise_from=base) for name in ("chat", "bare"))
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    (bare / "tokenizer.json").unlink()
    SourceSet.open(model(base), {"chat": model(chat), "bare": model(bare)})


def test_different_sentencepiece_models_are_refused(tmp_path: Path):
    folders = [tiny_model(tmp_path / name) for name in ("base", "other")]
    for folder in folders:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"the same")
    SourceSet.open(model(folders[0]), {"other": model(folders[1])})
    (folders[1] / "tokenizer.model").write_bytes(b"not the same")
    assert "`tokenizer.model` is another file" in problem(folders[0], other=model(folders[1]))


def test_unigram_vocabularies_are_read_in_order(tmp_path: Path):
    data = {"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}, "added_tokens": [{"content": "<x>", "id": 7}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert vocabulary(tmp_path) == {"<unk>": 0, "a": 1, "<x>": 7}


def test_added_tokens_are_no_difference_where_allowed():
    assert difference({"a": 0, "b": 1}, {"a": 0}, allow_added=True) is None
    assert difference({"a": 0}, {"a": 0, "b": 1}, allow_added=True) is None
    assert (
        difference({"a": 1, "b": 0}, {"a": 0}, allow_added=True) == "token `a` has id 1, the base's has id 0"
    )


def test_an_adapter_for_a_wider_base_names_model_tensor_and_both_shapes(base: Path, tmp_path: Path):
    wide = tiny_model(tmp_path / "wide", hidden=128)
    text = problem(base, math=adapter(tiny_adapter(tmp_path / "lora", wide, targets=("q_proj",))))
    assert text == (
        "model `math`: tensor `model.layers.0.self_attn.q_proj.weight` has shape (128, 128), "
        "base has (64, 64); the adapter is for another base"
    )


def test_an_adapter_for_a_deeper_base_names_the_tensor(base: Path, tmp_path: Path):
    deep = tiny_model(tmp_path / "deep", layers=3)
    text = problem(base, math=adapter(tiny_adapter(tmp_path / "lora", deep)))
    assert "model `math`: the adapter changes `model.layers.2.mlp.down_proj.weight` of shape (64, 96)" in text
    assert text.endswith("the adapter is for another base")


def test_an_adapter_whose_tokens_have_other_ids_is_refused(base: Path, tmp_path: Path):
    folder = tiny_adapter(tmp_path / "lora", base)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"A": 5}}}')
    assert "token `A` has id 5, the base's has id 37" in problem(base, lora=adapter(folder))


def test_an_adapter_that_was_saved_with_a_token_more_is_taken(base: Path, tmp_path: Path):
    folder = tiny_adapter(tmp_path / "lora", base)
    tiny_tokenizer(folder, extra=("[PAD]",))
    SourceSet.open(model(base), {"lora": adapter(folder)})


def test_an_adapter_that_names_another_base_but_fits_is_taken(base: Path, tmp_path: Path):
    folder = tiny_adapter(tmp_path / "lora", base, config={"base_model_name_or_path": "someone/elsewhere"})
    SourceSet.open(model(base), {"lora": adapter(folder)})


def test_all_models_that_do_not_fit_are_listed_one_line_each(base: Path, tmp_path: Path):
    text = problem(
        base,
        good=model(tiny_model(tmp_path / "good", seed=1, noise_from=base)),
        big=model(tiny_model(tmp_path / "big", vocab=130)),
        shallow=model(tiny_model(tmp_path / "shallow", layers=1)),
    )
    assert [line.split(":")[0] for line in text.splitlines()] == ["model `big`", "model `shallow`"]
