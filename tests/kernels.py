"""Sources and settings for the tests of the accelerator's kernels, in the interpreter and on a device."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from evomerge.merge.device_tables import FAMILY
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import own_or_delta
from evomerge.sources.streamed import TaskVector

SHAPES = {
    "model.embed_tokens.weight": (50, 45),  # more than a block, and no multiple of one
    "model.layers.0.self_attn.q_proj.weight": (16, 24),
    "model.layers.0.mlp.up_proj.weight": (16, 128),  # one block to the last entry
    "model.layers.0.input_layernorm.weight": (16,),
}
NAMES = tuple(SHAPES)
CELLS = (Cell(None, "embedding"), Cell(0, "attention"), Cell(0, "mlp"), Cell(0, "norm"))
MODELS = ("full", "coarse", "adapter", "other")
METHODS = tuple(FAMILY)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KernelSources:
    """Two full checkpoints, of which `coarse` has many equal differences, an adapter, and a third checkpoint.

    `other` does not change the norm, and `adapter` changes the attention alone.
    """

    base_name = "base"
    models = MODELS
    statistics = {}  # noqa: RUF012

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def noise(name: str) -> torch.Tensor:
            return torch.randn(SHAPES[name], generator=generator)

        self.base = {name: (noise(name) * 0.1).to(dtype) for name in NAMES}
        self.own: dict[tuple[str, str], torch.Tensor] = {}
        for name in NAMES:
            base = self.base[name].float()
            self.own["full", name] = (base + 0.02 * noise(name)).to(dtype)
            self.own["coarse", name] = (base + (noise(name) * 2).round() / 64).to(dtype)
            self.own["other", name] = (base + 0.02 * noise(name) * (noise(name) > 0)).to(dtype)
        del self.own["other", NAMES[3]]
        self.lora = {("adapter", NAMES[1]): 0.02 * noise(NAMES[1])}

    def base_tensor(self, name: str) -> torch.Tensor:
        return self.base[name]

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor | None:
        own = self.own.get((model, name))
        delta = self.delta(model, name) if own is None else own_or_delta(own, base.reshape(own.shape))
        return None if delta is None else delta.reshape(-1)

    def delta(self, model: str, name: str) -> torch.Tensor | None:
        own = self.own.get((model, name))
        return self.lora.get((model, name)) if own is None else own.float() - self.base[name].float()

    def streamed_delta(self, model: str, name: str, base: torch.Tensor) -> TaskVector | None:
        raise AssertionError("only large tensors are streamed")


class DeltaSources(KernelSources):
    """The same as task vectors in float32."""

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor | None:
        delta = self.delta(model, name)
        return None if delta is None else delta.reshape(-1)


def plan_of(settings: Setting | Sequence[Setting], seed: int = 0) -> MergePlan:
    """One setting for every tensor, or one for each."""
    each = [settings] * 4 if isinstance(settings, Setting) else settings
    return MergePlan.compile(Recipe("base", MODELS, dict(zip(CELLS, each, strict=True)), seed), Layout(NAMES))


def by_cpu(sources: KernelSources, plan: MergePlan) -> dict[str, torch.Tensor]:
    """Merged by numba or torch on the CPU."""
    return dict(Merger(sources, fused=False).materialize(plan))


def random_setting(name: str, rng: random.Random, rescale: bool = False) -> Setting:
    """Of one to four models."""
    spec = SPECS[name]

    def values() -> dict[str, float]:
        density = rng.choice([1.0, 0.5, 0.2, 0.85, 0.97, 1e-9])
        found = {"weight": rng.choice([1.0, 0.3, -0.4, 0.0, 1.7]), "density": density, "gamma": 0.03}
        found["epsilon"] = 0.0 if density not in (0.5, 0.85, 0.2) else rng.choice([0.0, 0.1])
        return {key: found[key] for key in spec.per_model}

    shared = {"lambda": rng.choice([1.0, 0.7]), "normalize": rng.random() < 0.5, "rescale": rescale}
    models = {model: values() for model in rng.sample(MODELS, rng.randint(1, 4))}
    if name == "linear":
        models[next(iter(models))]["weight"] = 5.0  # no sum of zero
    return Setting(name, {key: shared[key] for key in spec.shared}, models)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    words = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.shape == other.shape and torch.equal(one.cpu().view(words), other.cpu().view(words))
