"""Tensors of Llama-like models, without their values: what the benchmarks make random models of."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """What a model looks like: sizes as in its config.json."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    keys: int  # rows of k_proj and v_proj
    biases: bool = False
    tied: bool = False  # without an output layer of its own

    def layer(self, number: int) -> Shapes:
        """Name -> shape of the tensors of one layer."""
        h, m, kv = self.hidden, self.intermediate, self.keys
        found: Shapes = {
            "self_attn.q_proj.weight": (h, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, h),
            "mlp.gate_proj.weight": (m, h),
            "mlp.up_proj.weight": (m, h),
            "mlp.down_proj.weight": (h, m),
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }
        if self.biases:
            found |= {f"self_attn.{x}_proj.bias": (h if x == "q" else kv,) for x in "qkv"}
        return {f"model.layers.{number}.{name}": shape for name, shape in found.items()}

    def outside(self) -> Shapes:
        """Name -> shape of the tensors that belong to no layer."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        found["model.norm.weight"] = (self.hidden,)
        return found if self.tied else found | {"lm_head.weight": (self.vocabulary, self.hidden)}

    def tensors(self, layers: int | None = None) -> Shapes:
        """Name -> shape of all tensors, with this many layers."""
        found = self.outside()
        for number in range(self.layers if layers is None else layers):
            found |= self.layer(number)
        return found

    def entries(self, layers: int | None = None) -> int:
        """Parameters."""
        return entries(self.tensors(layers))


def entries(shapes: Shapes) -> int:
    """Numbers in all of these tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
