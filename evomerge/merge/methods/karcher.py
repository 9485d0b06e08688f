"""Karcher mean: the point of the sphere from which the directions of all models average to zero.

Each tensor is one flat vector. All models count alike; the base may be one of them.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evomerge.merge.methods._gram import flat_combination, flat_gram
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting

ANTIPODAL = 1e-12  # sine of an angle near pi, whose tangent has no direction

Matrix = Sequence[Sequence[float]]


def kernel(inputs: TensorInputs) -> Kernel:
    """(mean_i |theta_i|) mu, mu the Karcher mean of theta_i / |theta_i|.

    Models whose tensor is no longer than `tol` count in the length and not in the direction.
    """
    if len(inputs.deltas) == 1:
        return flat_combination(inputs, [1.0], whole=True)
    products = flat_gram(inputs, whole=True)
    factors = coefficients(products, int(inputs.parameter("max_iter")), inputs.parameter("tol"))
    return flat_combination(inputs, factors, whole=True)


def coefficients(products: Matrix, max_iter: int, tol: float) -> list[float]:
    """The factor of every model; `products` are the dot products of their tensors."""
    lengths = [math.sqrt(products[i][i]) for i in range(len(products))]
    kept = [i for i, length in enumerate(lengths) if length > tol]
    factors = [0.0] * len(lengths)
    if kept:
        cosines = [[products[i][j] / lengths[i] / lengths[j] for j in kept] for i in kept]
        size = math.fsum(lengths) / len(lengths)
        for i, part in zip(kept, mean_direction(cosines, max_iter, tol), strict=True):
            factors[i] = size * part / lengths[i]
    return factors


def mean_direction(cosines: Matrix, max_iter: int, tol: float) -> list[float]:
    """Coordinates of mu over unit vectors u_i with these dot products, by Riemannian gradient descent.

    Every iterate is a combination of the u_i, so it lives in its coordinates: with th_i = acos(mu . u_i),

        T = mean_i (th_i / sin th_i) (u_i - cos th_i mu),  mu <- cos|T| mu + sin|T| T / |T|
    """
    count = len(cosines)
    mu = [1.0 / count] * count
    length = _norm(cosines, mu)
    mu = [1.0, *[0.0] * (count - 1)] if length < tol else [part / length for part in mu]
    for _ in range(max_iter):
        tangent = [0.0] * count
        for i, row in enumerate(cosines):
            cosine = math.fsum(a * b for a, b in zip(row, mu, strict=True))
            cosine = min(1.0, max(-1.0, cosine))
            theta = math.acos(cosine)
            if theta < tol or math.sin(theta) < ANTIPODAL:
                continue
            factor = theta / math.sin(theta) / count
            tangent = [part - factor * cosine * m for part, m in zip(tangent, mu, strict=True)]
            tangent[i] += factor
        step = _norm(cosines, tangent)
        if step < tol:
            break
        sine = math.sin(step) / step
        mu = [math.cos(step) * m + sine * part for m, part in zip(mu, tangent, strict=True)]
        length = _norm(cosines, mu)
        mu = [part / length for part in mu]
    return mu


def _norm(products: Matrix, x: Sequence[float]) -> float:
    """Length of the vector with coordinates `x`."""
    square = math.fsum(a * b * products[i][j] for i, a in enumerate(x) for j, b in enumerate(x))
    return math.sqrt(max(0.0, square))


def canonical(setting: Setting) -> Setting:
    """One model alone is a copy."""
    setting = SPEC.complete(setting, SPEC.name)
    if len(setting.models) == 1:
        return Setting("linear", {"normalize": True}, {name: {"weight": 1.0} for name in setting.models})
    shared = {**setting.parameters, "max_iter": int(setting.parameters["max_iter"])}
    return Setting(SPEC.name, shared, setting.models)


SPEC = MethodSpec(
    name="karcher",
    shared={
        "max_iter": ParameterSpec(low=0, default=10, kind="int", doc="the most steps"),
        "tol": ParameterSpec(
            low=0.0, low_open=True, default=1e-5, doc="the step, angle and length that counts as zero"
        ),
    },
    per_model={},
    canonical=canonical,
    min_models=1,
    mergekit="karcher",
    source="Karcher 1977; arithmetic of mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, takes_base=True, streams=True),)
