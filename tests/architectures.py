"""Shapes and configs of tiny models in four architectures, as transformers names them.

A head has 16 dimensions where the caller does not say otherwise; key and value have one head (grouped-query
attention), except in GPT-NeoX, whose query, key and value are one matrix.
"""

from __future__ import annotations

from typing import Any

HEAD_DIM = 16
BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")  # the same in all models
Shapes = dict[str, tuple[int, ...]]


def shapes(architecture: str, layers: int, hidden: int, mlp: int, vocab: int, tied: bool) -> Shapes:
    """Every tensor of a checkpoint: "qwen2" (biases), "gemma" (always tied) or "gpt_neox" (never tied)."""
    if architecture == "gpt_neox":
        return _gpt_neox(layers, hidden, mlp, vocab)
    block: Shapes = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (HEAD_DIM, hidden),
        "self_attn.v_proj.weight": (HEAD_DIM, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if architecture == "qwen2":
        block |= {f"self_attn.{name}_proj.bias": block[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"}
    head: Shapes = {} if tied or architecture == "gemma" else {"lm_head.weight": (vocab, hidden)}
    return {
        **head,
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        **{f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
    }


def _gpt_neox(layers: int, hidden: int, mlp: int, vocab: int) -> Shapes:
    block: Shapes = {}
    linear = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (mlp, hidden),
        "mlp.dense_4h_to_h": (hidden, mlp),
    }
    for name, shape in linear.items():
        block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("input_layernorm", "post_attention_layernorm"):
        block |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    # buffers that Pythia's checkpoints hold and today's transformers neither reads nor writes
    block |= {"attention.bias": (1, 1, 8, 8), "attention.masked_bias": ()}
    block |= {"attention.rotary_emb.inv_freq": (HEAD_DIM // 8,)}
    return {
        "embed_out.weight": (vocab, hidden),
        "gpt_neox.embed_in.weight": (vocab, hidden),
        "gpt_neox.final_layer_norm.weight": (hidden,),
        "gpt_neox.final_layer_norm.bias": (hidden,),
        **{f"gpt_neox.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
    }


def config(architecture: str, layers: int, hidden: int, mlp: int, vocab: int, tied: bool) -> dict[str, Any]:
    """config.json without the special tokens and the dtype."""
    data: dict[str, Any] = {
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "max_position_embeddings": 512,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    if architecture == "gpt_neox":
        own = {"hidden_act": "gelu", "rotary_pct": 0.25, "tie_word_embeddings": False}
        return {**data, "architectures": ["GPTNeoXForCausalLM"], **own}
    data |= {"num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    if architecture == "gemma":
        own = {"head_dim": HEAD_DIM, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
        return {**data, "architectures": ["GemmaForCausalLM"], **own}
    return {**data, "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}
