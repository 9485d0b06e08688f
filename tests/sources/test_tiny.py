"""The tiny models of the test suite: transformers and peft load them, and seeds decide every number."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny import EOS, VOCAB, tiny_adapter, tiny_model


def test_transformers_loads_every_tensor(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    kinds = [("llama", True), ("llama", False), ("qwen2", True), ("gemma", True), ("gpt_neox", False)]
    for architecture, tied in kinds:
        folder = tiny_model(tmp_path / f"{architecture}{tied}", tied=tied, architecture=architecture)
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), architecture
        assert model.dtype == torch.bfloat16
        assert model.config.model_type == architecture


def test_the_tokenizer_gives_text_back(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path / "base"))
    text = "Then, on the table:\n\n  4 + 4.5 = 8.5!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == VOCAB == 128
    assert len(tokenizer.encode("the")) == 2  # the pair "th" is one token
    assert tokenizer.eos_token_id == EOS


def test_the_chat_template_ends_with_the_assistants_turn(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path / "base"))
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_seeds_decide_the_weights(tmp_path: Path):
    torch.rand(3)  # the global generator must not matter
    base = tiny_model(tmp_path / "base")
    same = load_file(tiny_model(tmp_path / "same") / "model.safetensors")
    other = load_file(tiny_model(tmp_path / "other", seed=1) / "model.safetensors")
    tuned = load_file(tiny_model(tmp_path / "tuned", seed=1, noise_from=base) / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = load_file(base / "model.safetensors")[name]
    assert torch.equal(same[name], weight)
    assert (other[name].float() - weight.float()).std() > 0.1
    # 4096 numbers of standard deviation 0.01: 5 sigma of their own deviation is 5.5 %, rounding adds less
    assert abs((tuned[name].float() - weight.float()).std() / 0.01 - 1) < 0.08


def test_making_one_takes_less_than_a_fifth_of_a_second(tmp_path: Path):
    start = time.perf_counter()
    base = tiny_model(tmp_path / "base")
    tiny_model(tmp_path / "tuned", seed=1, noise_from=base)
    tiny_adapter(tmp_path / "adapter", base)
    assert time.perf_counter() - start < 3 * 0.2
