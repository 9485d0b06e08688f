"""Two-layer models of four architectures, LoRA adapters and a working tokenizer, made quickly from seeds.

Files are written with safetensors and tokenizers alone, so neither transformers nor peft is imported; both
load what is written here (tests/sources/test_tiny.py). Every number comes from (seed, tensor name).

    base = tiny_model(tmp_path / "base")
    expert = tiny_model(tmp_path / "math", seed=1, noise_from=base)
    adapter = tiny_adapter(tmp_path / "lora", base, seed=2)
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models

from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests import architectures

HIDDEN, HEADS, HEAD_DIM, MLP, LAYERS = 64, 2, 32, 96, 2
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<unk>")
PAD, START, EOS, UNK = range(4)
LETTERS = (*map(chr, range(32, 127)), "\n")
PAIRS = re.findall("..", "thheineranreonatenndtiesorteofedisitalarsttontngsehaasou")  # frequent in English
VOCAB = len(SPECIAL) + len(LETTERS) + len(PAIRS)  # 128
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(
    folder: Path,
    seed: int = 0,
    *,
    noise_from: Path | None = None,
    noise: float = 0.01,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    architecture: str = "llama",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with tokenizer to `folder` and return it.

    Args:
        folder: created; files in it are overwritten.
        seed: of the weights, or of the noise.
        noise_from: a folder written by this function: take its config and weights and add noise, as
            fine-tuning would; the arguments after `noise` are then not looked at.
        noise: standard deviation of that noise (the weights' own is 0.1).
        tied: one matrix for embedding and head, stored once.
        dtype: of all tensors.
        layers, hidden, vocab: size; heads have 32 dimensions, the mlp 1.5 times `hidden`. Rows past the
            tokenizer's 128 tokens are padding.
        architecture: "llama", "qwen2", "gemma" (always tied) or "gpt_neox" (never tied).
        config: entries that replace those of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if noise_from is None:
        tensors = {
            name: 0.1 * _normal(seed, name, shape) if len(shape) == 2 else torch.ones(shape)
            for name, shape in _shapes(layers, hidden, vocab, tied, architecture).items()
        }
        tensors = {
            name: tensor.to(torch.uint8 if name.endswith(".attention.bias") else dtype)
            for name, tensor in tensors.items()
        }
        data = {**_config(layers, hidden, vocab, tied, dtype, architecture), **(config or {})}
        tiny_tokenizer(folder)
    else:
        tensors = {
            name: tensor
            if name.endswith(architectures.BUFFERS)
            else (tensor.float() + noise * _normal(seed, name, tensor.shape)).to(tensor.dtype)
            for name, tensor in load_file(noise_from / "model.safetensors").items()
        }
        data = {**json.loads((noise_from / "config.json").read_text()), **(config or {})}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(noise_from / name, folder / name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(data, indent=2))
    generation = {"bos_token_id": START, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def tiny_family(folder: Path, dtype: torch.dtype = torch.bfloat16) -> SourceSet:
    """A base, a full checkpoint `full` and an `adapter`, opened together."""
    base = tiny_model(folder / "base", dtype=dtype)
    full = tiny_model(folder / "full", seed=1, noise_from=base, noise=0.05)
    adapter = tiny_adapter(folder / "adapter", base, seed=2)
    models = {"full": SourceRef(model=str(full)), "adapter": SourceRef(adapter=str(adapter))}
    return SourceSet.open(SourceRef(model=str(base)), models)


def tiny_tokenizer(folder: Path, extra: Sequence[str] = ()) -> Path:
    """Write a tokenizer of 128 tokens: 4 special ones, printable ASCII, and 28 pairs of letters.

    Text of printable ASCII and newlines survives encode and decode unchanged.

    Args:
        folder: exists.
        extra: special tokens added after the 128.
    """
    vocab = {token: number for number, token in enumerate((*SPECIAL, *LETTERS, *PAIRS))}
    tokenizer = Tokenizer(models.BPE(vocab, [(pair[0], pair[1]) for pair in PAIRS], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL, *extra)])
    tokenizer.save(str(folder / "tokenizer.json"))
    data = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(data, indent=2))
    return folder


def tiny_adapter(
    folder: Path,
    base: Path,
    seed: int = 0,
    r: int = 4,
    *,
    alpha: int = 8,
    targets: Sequence[str] = ("q_proj", "v_proj", "down_proj"),
    full: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA adapter for `base` in peft's format to `folder` and return it; B is not zero.

    Args:
        folder: created; files in it are overwritten.
        base: a folder written by `tiny_model`.
        seed: of the factors.
        r, alpha: rank and scale; the delta is alpha / r * B @ A.
        targets: module names, in every layer; "embed_tokens" makes an embedding adapter.
        full: tensors trained in full, by their name in the base.
        config: entries that replace those of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets:
            continue
        outputs, inputs = tensor.shape
        embedding = module.endswith("embed_tokens")
        if embedding:
            outputs, inputs = inputs, outputs
        end = "lora_embedding_{}" if embedding else "lora_{}.weight"
        for side, shape in (("A", (r, inputs)), ("B", (outputs, r))):
            key = f"base_model.model.{module}.{end.format(side)}"
            tensors[key] = 0.1 * _normal(seed, key, shape)
    tensors.update({f"base_model.model.{name}": tensor for name, tensor in (full or {}).items()})
    data = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "modules_to_save": [name.split(".")[-2] for name in full] if full else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "inference_mode": True,
        **(config or {}),
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(data, indent=2))
    return folder


def _shapes(
    layers: int, hidden: int, vocab: int, tied: bool, architecture: str
) -> dict[str, tuple[int, ...]]:
    mlp = hidden * MLP // HIDDEN
    if architecture != "llama":
        return architectures.shapes(architecture, layers, hidden, mlp, vocab, tied)
    block = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {} if tied else {"lm_head.weight": (vocab, hidden)}
    shapes.update({"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)})
    for layer in range(layers):
        shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in block.items()})
    return shapes


def _config(
    layers: int, hidden: int, vocab: int, tied: bool, dtype: torch.dtype, architecture: str
) -> dict[str, Any]:
    ends = {
        "bos_token_id": START,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if architecture != "llama":
        mlp = hidden * MLP // HIDDEN
        return {**architectures.config(architecture, layers, hidden, mlp, vocab, tied), **ends}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * MLP // HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        **ends,
    }


def _normal(seed: int, name: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal float32 numbers that depend on seed and name only, never on the global generator."""
    number = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:4], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))
