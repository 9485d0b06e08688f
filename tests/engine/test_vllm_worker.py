"""What is streamed into vLLM, as far as no vLLM is needed to see it."""

from __future__ import annotations

import pytest

from evomerge.engine.vllm_worker import with_neighbours
from evomerge.sources.layout import Layout

LAYER = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.experts.0.up_proj.weight"]
TOWER = [f"visual.blocks.{i}.attn.{part}.weight" for i in range(2) for part in "qkv"]
OUTSIDE = ["model.embed_tokens.weight", "lm_head.weight"]
LAYOUT = Layout([*OUTSIDE, *(f"model.layers.{i}.{name}" for i in range(2) for name in LAYER), *TOWER])


@pytest.mark.parametrize(
    ("changed", "streamed"),
    [
        ("model.layers.1.self_attn.k_proj.weight", {f"model.layers.1.{name}" for name in LAYER}),
        ("visual.blocks.0.attn.k.weight", set(TOWER[:3])),
        ("lm_head.weight", {"lm_head.weight"}),
    ],
)
def test_what_may_be_fused_with_a_changed_tensor_is_streamed_with_it(changed: str, streamed: set[str]):
    assert with_neighbours([changed], LAYOUT) == streamed


def test_nothing_is_streamed_where_nothing_changed():
    assert with_neighbours([], LAYOUT) == set()
