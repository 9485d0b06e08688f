"""Multi-SLERP: the weighted mean direction of several models or task vectors, at their mean length.

Each tensor is one flat vector.

Imports: `evomerge.recipe`, `evomerge.errors`; torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evomerge.errors import RecipeError
from evomerge.merge.methods._gram import FORM, TASK_VECTORS, flat_combination, flat_gram
from evomerge.merge.methods._gta import WEIGHT
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting, rounded

SMALLEST_SUM = 1e-8  # weights that sum to less than this in absolute value cannot be normalised


def kernel(inputs: TensorInputs) -> Kernel:
    """cos(eps) (sum_i w_i |x_i|) mu, mu = sum_i w_i u_i / |sum_i w_i u_i|, u_i = x_i / (|x_i| + eps).

    mergekit adds a step in the tangent space at mu, of sum_i w_i (u_i - (u_i . mu) mu). That sum is zero,
    because sum_i w_i u_i is a multiple of mu; what is left of the step is the cosine of `eps`.

    Models of weight 0 take no part. One model alone is copied, whatever its weight. Task vectors that are
    all zero give the base; from three models on mergekit refuses them.

    Raises:
        RecipeError: the weights sum to zero and `normalize_weights` is true, or the directions cancel.
    """
    whole = not inputs.parameter(TASK_VECTORS)
    weights = inputs.values("weight")
    if inputs.parameter("normalize_weights"):
        total = math.fsum(weights)
        if abs(total) < SMALLEST_SUM:
            raise RecipeError(
                f"{inputs.where}: the weights of multislerp sum to {total:g}, and they are divided by that "
                "sum; change a weight or set `normalize_weights` to false"
            )
        weights = [weight / total for weight in weights]
    if len(weights) == 1:
        weights = [1.0]
    kept = [i for i, weight in enumerate(weights) if weight != 0.0]
    factors = [0.0] * len(weights)
    if [weights[i] for i in kept] == [1.0]:
        factors[kept[0]] = 1.0
    else:
        products = flat_gram(inputs, whole=whole)
        square = [[products[i][j] for j in kept] for i in kept]
        found = coefficients(square, [weights[i] for i in kept], inputs.parameter("eps"), inputs.where)
        for i, factor in zip(kept, found, strict=True):
            factors[i] = factor
    return flat_combination(inputs, factors, whole=whole)


def coefficients(
    products: Sequence[Sequence[float]], weights: Sequence[float], eps: float, where: str
) -> list[float]:
    """The factor of every model; `products` are the dot products of their vectors."""
    lengths = [math.sqrt(products[i][i]) for i in range(len(weights))]
    direction = [weight / (length + eps) for weight, length in zip(weights, lengths, strict=True)]
    square = math.fsum(
        a * b * products[i][j] for i, a in enumerate(direction) for j, b in enumerate(direction)
    )
    norm = math.sqrt(max(0.0, square))
    if norm < eps:
        if len(weights) <= 2 or not any(lengths):
            return list(weights)
        raise RecipeError(
            f"{where}: the directions of the models cancel under the weights of multislerp; change a weight"
        )
    size = math.cos(eps) * math.fsum(w * length for w, length in zip(weights, lengths, strict=True))
    return [size * part / norm for part in direction]


def keeps_base(setting: Setting) -> bool:
    """Zero task vectors leave the base; whole models are scaled by the sum of their weights."""
    if setting.parameters[TASK_VECTORS] or setting.parameters["normalize_weights"]:
        return True
    return len(setting.models) == 1 or math.fsum(v["weight"] for v in setting.models.values()) == 1.0


def canonical(setting: Setting) -> Setting:
    """Normalised weights sum to 1, models of weight 0 are left out, one model alone is a copy."""
    setting = SPEC.complete(setting, SPEC.name)
    weights = {name: values["weight"] for name, values in setting.models.items()}
    normalize = setting.parameters["normalize_weights"]
    total = math.fsum(weights.values())
    if normalize and abs(total) >= SMALLEST_SUM and abs(total - 1.0) > 1e-6 * len(weights):
        weights = {name: weight / total for name, weight in weights.items()}
    weights = {name: rounded(weight) for name, weight in weights.items()}
    kept = {name: weight for name, weight in weights.items() if weight != 0.0}
    if len(weights) == 1 or (normalize and len(kept) == 1):
        copied = kept or weights
        if normalize and not kept:  # a sum of zero, which the merge refuses
            return Setting(SPEC.name, setting.parameters, {name: {"weight": 0.0} for name in weights})
        return Setting("linear", {"normalize": True}, {name: {"weight": 1.0} for name in copied})
    if len(kept) < 2:  # without `normalize_weights` the weight of a model left alone would be lost
        kept = weights
    return Setting(SPEC.name, setting.parameters, {name: {"weight": kept[name]} for name in kept})


SPEC = MethodSpec(
    name="multislerp",
    shared={
        TASK_VECTORS: FORM,
        "normalize_weights": ParameterSpec(kind="bool", default=True, doc="divide the weights by their sum"),
        "eps": ParameterSpec(low=0.0, low_open=True, default=1e-8, doc="what is added to a length"),
    },
    per_model={"weight": WEIGHT},
    canonical=canonical,
    min_models=1,
    mergekit="multislerp",
    source="mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, keeps_base=keeps_base, streams=True),)
