"""Fisher information and Gram matrices of a tiny model in float64, against computations of another kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from evomerge.statistics.fisher import _drawn, diagonal_fisher
from evomerge.statistics.gram import gram_bytes, input_grams, shared_inputs
from evomerge.statistics.texts import Tokens
from tests.tiny import HEAD_DIM, HEADS, tiny_model

TEXTS = [Tokens((5, 9, 30, 41, 7), 1), Tokens((60, 61, 62), 2), Tokens((11, 80, 80, 90, 20, 33), 3)]
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.nn.Module]:
    """One layer, untied, float64; weights large enough that its distribution is not uniform."""
    import transformers

    folder = tiny_model(tmp_path_factory.mktemp("tiny") / "model", layers=1, tied=False, dtype=torch.float64)
    transformers.utils.logging.disable_progress_bar()
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    yield net.eval()
    transformers.utils.logging.enable_progress_bar()


def names(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def gradient(model, tokens: Tokens, targets: list[int]) -> dict[str, torch.Tensor]:
    """Of the log-likelihood of `targets` at the scored places, by autograd, one probability at a time."""
    probabilities = model(input_ids=torch.tensor([tokens.ids])).logits[0].softmax(-1)
    places = range(tokens.first - 1, len(tokens.ids) - 1)
    value = sum(probabilities[place, target].log() for place, target in zip(places, targets, strict=True))
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def test_the_empirical_fisher_is_the_mean_of_squared_gradients_of_single_texts(model):
    rows = [gradient(model, tokens, list(tokens.ids[tokens.first :])) for tokens in TEXTS]
    found = diagonal_fisher(model, names(model), TEXTS, estimator="empirical")
    scored = sum(tokens.scored for tokens in TEXTS)
    assert set(found) == set(names(model))
    for name, fisher in found.items():
        expected = sum(row[name].square() for row in rows) / scored
        torch.testing.assert_close(fisher, expected, rtol=1e-10, atol=1e-15)


def test_the_sampled_fisher_has_the_information_for_its_mean(model):
    """The trace for one matrix: E over y of the squared gradient, exact over 128 tokens; a mean of draws."""
    tokens, name, draws = Tokens((5, 9, 30), 2), f"{LAYER}.mlp.down_proj.weight", 50
    probabilities = model(input_ids=torch.tensor([tokens.ids])).logits[0, 1].softmax(-1).detach()
    traces = torch.stack([gradient(model, tokens, [y])[name].square().sum() for y in range(128)])
    exact = probabilities @ traces
    found = diagonal_fisher(model, [name], [tokens] * draws, seed=1)[name].sum()
    deviation = (probabilities @ traces.square() - exact.square()).sqrt()
    assert abs(found - exact) <= 4 * deviation / draws**0.5
    assert deviation / draws**0.5 < 0.08 * exact


def test_sampled_tokens_have_the_probabilities_of_the_model():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    drawn = _drawn(probabilities.log().expand(40_000, 4), torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    assert shares[1] == 0.0
    torch.testing.assert_close(shares.double(), probabilities, rtol=0, atol=5 * 0.5 / 200)


def test_the_sampled_fisher_depends_on_the_seed_alone(model):
    name = f"{LAYER}.self_attn.q_proj.weight"
    torch.manual_seed(3)
    first = diagonal_fisher(model, [name], TEXTS, seed=5)[name]
    torch.rand(7)
    assert torch.equal(diagonal_fisher(model, [name], TEXTS, seed=5)[name], first)
    assert not torch.equal(diagonal_fisher(model, [name], TEXTS, seed=6)[name], first)


def test_measuring_leaves_the_model_as_it_was(model):
    model.requires_grad_(False)
    try:
        diagonal_fisher(model, names(model)[:2], TEXTS)
        input_grams(model, names(model), TEXTS)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not any(m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    finally:
        model.requires_grad_(True)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su 2021) of `(heads, tokens, d)`, halves of d as real and imaginary parts."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def activations(model: torch.nn.Module, ids: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Inputs of the linear layers of a one-layer Llama, written out from its weights."""
    w = {name: p.detach() for name, p in model.named_parameters()}
    x = w["model.embed_tokens.weight"][list(ids)]
    a = norm(x, w[f"{LAYER}.input_layernorm.weight"])
    q, k, v = (
        (a @ w[f"{LAYER}.self_attn.{side}_proj.weight"].T).view(len(ids), HEADS, HEAD_DIM).transpose(0, 1)
        for side in "qkv"
    )
    o = scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    o = o.transpose(0, 1).reshape(len(ids), -1)
    x = x + o @ w[f"{LAYER}.self_attn.o_proj.weight"].T
    m = norm(x, w[f"{LAYER}.post_attention_layernorm.weight"])
    d = silu(m @ w[f"{LAYER}.mlp.gate_proj.weight"].T) * (m @ w[f"{LAYER}.mlp.up_proj.weight"].T)
    x = x + d @ w[f"{LAYER}.mlp.down_proj.weight"].T
    return {
        f"{LAYER}.self_attn.q_proj.weight": a,
        f"{LAYER}.self_attn.o_proj.weight": o,
        f"{LAYER}.mlp.gate_proj.weight": m,
        f"{LAYER}.mlp.down_proj.weight": d,
        "lm_head.weight": norm(x, w["model.norm.weight"]),
    }


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_gram_matrices_are_those_of_the_inputs_written_out(model, batch):
    owners = set(shared_inputs(model, names(model), TEXTS).values())
    found = input_grams(model, owners, TEXTS, batch=batch)
    rows = [activations(model, tokens.ids) for tokens in TEXTS]
    assert set(found) == set(rows[0])
    for name, gram in found.items():
        x = torch.cat([row[name] for row in rows])
        torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-5, atol=1e-6)  # rotary angles: float32


def test_layers_with_one_input_share_a_matrix(model):
    owners = shared_inputs(model, names(model), TEXTS)
    q, gate = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.gate_proj.weight"
    assert {name for name, owner in owners.items() if owner == q} == {
        f"{LAYER}.self_attn.{side}_proj.weight" for side in "qkv"
    }
    assert {name for name, owner in owners.items() if owner == gate} == {
        f"{LAYER}.mlp.{side}_proj.weight" for side in ("gate", "up")
    }


def test_the_memory_of_matrices_is_known_before_they_are_made(model):
    sizes = gram_bytes(model, shared_inputs(model, names(model), TEXTS))
    assert next(iter(sizes.items())) == (f"{LAYER}.mlp.down_proj.weight", 4 * 96 * 96)
    assert sum(sizes.values()) == 4 * (96 * 96 + 4 * 64 * 64)


class EverySecondToken(torch.nn.Module):
    """A layer that sees half of the tokens, as an expert does."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 3)
        self.expert, self.all = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, **_: object) -> None:
        x = self.embed(input_ids)
        self.expert(x[:, ::2])
        self.all(x)


def test_a_layer_whose_inputs_are_not_one_per_token_is_left_out():
    found = input_grams(EverySecondToken(), ["expert.weight", "all.weight"], [Tokens((1, 2, 3), 1)])
    assert list(found) == ["all.weight"]
