"""What the methods on task vectors share that are not of mergekit's family: who takes part, sums, scales.

A model whose weight is 0 takes no part in any of them, so N, the number of models in a formula, is that of
the weights other than 0.

Imports: `evomerge.recipe`, `evomerge.sources.layout`; torch inside functions only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from evomerge.merge.methods._gta import canonical_sum
from evomerge.merge.methods._method import Kernel, TensorInputs
from evomerge.recipe import BASE_COPY, DECIMALS, Setting, rounded
from evomerge.sources.layout import MODULES

if TYPE_CHECKING:
    import torch

VOCABULARY = re.compile("|".join(MODULES["embedding"]))  # embeddings and output heads, as in recipes


class Part(NamedTuple):
    """A model that takes part and changes the tensor: neither its weight nor its task vector is zero."""

    model: str
    delta: torch.Tensor
    weight: float


def parts(inputs: TensorInputs) -> list[Part]:
    """The models that take part and change the tensor, in the setting's order."""
    rows = zip(inputs.models, inputs.deltas, inputs.values("weight"), strict=True)
    whole = [
        (model, delta[:], weight) for model, delta, weight in rows if weight != 0.0 and delta is not None
    ]
    return [Part(model, delta, weight) for model, delta, weight in whole if _changes(inputs, model, delta)]


def _changes(inputs: TensorInputs, model: str, delta: torch.Tensor) -> bool:
    return inputs.once(("changes", model), lambda: bool(delta.any()))


def n_models(inputs: TensorInputs) -> int:
    """N: the models that take part, those included that do not change the tensor."""
    return sum(weight != 0.0 for weight in inputs.values("weight"))


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token or position: its singular directions mean little."""
    return VOCABULARY.search(name) is not None


def is_embedding(name: str) -> bool:
    """Whether a tensor is looked up by row: a vocabulary tensor other than the output head."""
    return is_vocabulary(name) and "lm_head" not in name


def add_mean(inputs: TensorInputs) -> Kernel:
    """base + lambda (sum_i w_i delta_i) / N."""
    import torch

    scale = inputs.parameter("lambda")
    terms = [(part.delta, scale * part.weight / n_models(inputs)) for part in parts(inputs)]
    scratch = inputs.scratch(2)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        mix, term = scratch[:, : high - low]
        mix.zero_()
        for delta, factor in terms:
            mix.add_(torch.mul(delta[low:high], factor, out=term))
        out.add_(mix)

    return run


def add_whole(merged: torch.Tensor) -> Kernel:
    """base + merged, for a task vector that was merged as a whole; any shape of n entries."""
    flat = merged.reshape(-1)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        out.add_(flat[low:high])

    return run


def keep_base(low: int, high: int, out: torch.Tensor) -> None:
    """The kernel that changes nothing."""


def fold_lambda(setting: Setting) -> Setting:
    """Canonical form where `lambda` times the merge is the merge of `lambda` times the weights.

    `lambda` 1, no model of weight 0, a weight other than 0 never rounded to 0: that would change N.

    Args:
        setting: complete, of a method with `lambda` and `weight`; other parameters are kept as they are.
    """
    scale = setting.parameters["lambda"]
    models = {}
    for name, values in setting.models.items():
        if values["weight"] != 0.0:
            models[name] = {**values, "weight": _not_zero(values["weight"] * scale)}
    if not models or rounded(scale) == 0.0:
        return BASE_COPY
    return Setting(setting.method, {**setting.parameters, "lambda": 1.0}, models)


def alone(setting: Setting) -> Setting:
    """Task arithmetic with the one model of a setting of which nothing but weight and `lambda` counts."""
    shared = {"lambda": setting.parameters["lambda"], "normalize": False}
    models: Mapping[str, Mapping[str, float]] = {
        name: {"weight": values["weight"]} for name, values in setting.models.items()
    }
    return canonical_sum(Setting("task_arithmetic", shared, models))


def _not_zero(weight: float) -> float:
    """`weight` rounded, at least one unit of the last decimal away from 0."""
    return rounded(weight) or (10.0**-DECIMALS if weight >= 0.0 else -(10.0**-DECIMALS))
