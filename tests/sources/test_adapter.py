"""Adapters against peft: every supported kind gives the weights that `merge_and_unload` gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import SourceError
from evomerge.sources.adapter import Adapter
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests.tiny import tiny_adapter, tiny_model

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, float32."""
    folder = tmp_path_factory.mktemp("models") / "base"
    return tiny_model(folder, tied=False, dtype=torch.float32)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()


def assert_as_peft(base: Path, adapter: Path) -> None:
    """Every delta equals peft's merged weight minus the base's; tensors without one are unchanged."""
    sources = SourceSet.open(SourceRef(model=str(base)), {"lora": SourceRef(adapter=str(adapter))})
    merged = merged_by_peft(base, adapter)
    changed = 0
    for name in sources.tensor_names:
        delta = sources.delta("lora", name)
        if delta is None:
            assert torch.equal(merged[name], sources.base_tensor(name)), name
        else:
            assert delta.dtype == torch.float32
            # entries are below 1: float32 rounds base + delta by 6e-8
            torch.testing.assert_close(delta, merged[name] - sources.base_tensor(name), rtol=0, atol=1e-6)
            changed += 1
    assert changed > 0


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 32, r"layers\.1\.mlp\.down_proj": 2}},
        {"alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    ],
)
def test_deltas_are_those_of_peft(base: Path, tmp_path: Path, config: dict[str, Any]):
    assert_as_peft(base, tiny_adapter(tmp_path / "lora", base, config=config))


def test_rank_patterns_are_those_of_peft(base: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj", "down_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 6},
        alpha_pattern={"layers.0.mlp.up_proj": 5},
        init_lora_weights=False,
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    assert_as_peft(base, tmp_path / "lora")


def test_an_embedding_adapter_is_that_of_peft(base: Path, tmp_path: Path):
    assert_as_peft(base, tiny_adapter(tmp_path / "lora", base, targets=("embed_tokens", "lm_head", "o_proj")))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_saved_embedding_layers_are_those_of_peft(base: Path, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "lora")  # stores `embed_tokens.base_layer.weight` as well
    assert_as_peft(base, tmp_path / "lora")


def test_a_replaced_embedding_with_lora_on_it_adds_up_as_in_peft(base: Path, tmp_path: Path):
    key = "model.embed_tokens.base_layer.weight"
    replaced = 1.5 * load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    config = {"modules_to_save": None}
    assert_as_peft(
        base,
        tiny_adapter(tmp_path / "lora", base, targets=("embed_tokens",), full={key: replaced}, config=config),
    )


def test_modules_trained_in_full_are_those_of_peft(base: Path, tmp_path: Path):
    full = {name: 1.5 * load_file(base / "model.safetensors")[name] for name in ("lm_head.weight",)}
    adapter = tiny_adapter(tmp_path / "lora", base, full=full)
    assert_as_peft(base, adapter)
    assert set(Adapter(adapter).full) == {"lm_head.weight"}


def test_fan_in_fan_out_transposes_as_peft_does(tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "base")
    # Conv1D of c_attn stores (inputs 8, outputs 24)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    assert_as_peft(tmp_path / "base", tmp_path / "lora")


def test_half_precision_factors_are_multiplied_in_float32(base: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "lora", base)
    tensors = {k: v.bfloat16() for k, v in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert_as_peft(base, adapter)  # peft casts the factors to float32 when it loads them


def test_a_delta_is_bitwise_the_same_each_time(base: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "lora", base)
    name = "model.layers.0.mlp.down_proj.weight"
    first, second = Adapter(adapter).delta(name), Adapter(adapter).delta(name)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_a_tensor_that_is_no_target_has_no_delta(base: Path, tmp_path: Path):
    adapter = Adapter(tiny_adapter(tmp_path / "lora", base, targets=("q_proj",)))
    assert adapter.delta("model.layers.0.self_attn.k_proj.weight") is None


def test_the_hash_covers_the_scale(base: Path, tmp_path: Path):
    small = Adapter(tiny_adapter(tmp_path / "small", base, alpha=8))
    large = Adapter(tiny_adapter(tmp_path / "large", base, alpha=16))
    assert small.sha256() != large.sha256()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "`use_dora` is set; supported is LoRA"),
        ({"bias": "all"}, "`bias` is `all`; supported is LoRA"),
        ({"lora_bias": True}, "`lora_bias` is set"),
        ({"peft_type": "IA3"}, "`peft_type` is `IA3`; supported is LoRA"),
        ({"peft_type": "PREFIX_TUNING"}, "`peft_type` is `PREFIX_TUNING`"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "`target_parameters` is set"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication` is set"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "`init_lora_weights` is `pissa_niter_4`, which changes the base",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    base: Path, tmp_path: Path, config: dict[str, Any], message: str
):
    with pytest.raises(SourceError, match=message):
        Adapter(tiny_adapter(tmp_path / "lora", base, config=config))


def test_a_rank_that_the_factors_lack_is_refused(base: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "lora", base, r=4, config={"r": 8})
    with pytest.raises(SourceError, match=r"lora_A of shape \(4, \d+\).*but r is 8"):
        Adapter(adapter)


def test_a_factor_without_its_partner_is_refused(base: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "lora", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(
        SourceError, match=r"only one of lora_A and lora_B for `model\.layers\.0\.self_attn\.q_proj`"
    ):
        Adapter(adapter)


def test_a_magnitude_vector_is_refused_by_name(base: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "lora", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(64)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"tensor `.*q_proj\.lora_magnitude_vector` is of an unknown kind"):
        Adapter(adapter)


def test_an_adapter_without_tensors_is_refused(base: Path, tmp_path: Path):
    with pytest.raises(SourceError, match="holds no tensors"):
        Adapter(tiny_adapter(tmp_path / "lora", base, targets=()))


def test_a_pickled_adapter_is_refused_with_the_way_out(base: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "lora", base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"holds `adapter_model\.bin` but no safetensors"):
        Adapter(adapter)


def test_a_truncated_adapter_is_refused(base: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "lora", base)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors` is truncated"):
        Adapter(adapter)


def test_a_model_given_as_an_adapter_is_named(base: Path):
    with pytest.raises(SourceError, match="holds a full model and no adapter; give it as `model:`"):
        Adapter(base)


def test_a_missing_config_is_named(tmp_path: Path):
    with pytest.raises(SourceError, match=r"adapter_config\.json` does not exist"):
        Adapter(tmp_path)
