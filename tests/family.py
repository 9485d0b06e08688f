"""A family of models that exists only as names: for tests of everything that needs no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from evomerge.merge.methods import SPECS
from evomerge.recipe import Cell
from evomerge.sources.layout import Layout
from evomerge.space import Family

LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def tensor_names(layers: int) -> list[str]:
    """Tensor names of a Llama with tied embeddings."""
    names = ["model.embed_tokens.weight"]
    for layer in range(layers):
        names += [f"model.layers.{layer}.{part}.weight" for part in (*LINEAR, "input_layernorm")]
    return [*names, "model.norm.weight"]


def family(
    layers: int = 12,
    models: Sequence[str] = ("math", "code", "chat"),
    changes: Mapping[str, AbstractSet[Cell]] | None = None,
    **fields: object,
) -> Family:
    """Models that change attention and mlp of every layer, as LoRA experts do, unless `changes` says else."""
    layout = Layout(tensor_names(layers))
    linear = {cell for cell in layout.by_cell if cell.module in ("attention", "mlp")}
    return Family(layout, changes or dict.fromkeys(models, linear), SPECS, **fields)  # type: ignore[arg-type]
