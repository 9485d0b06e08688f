"""Model Stock: from the base toward the models' average, as far as the angles between them justify.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from evomerge.merge.methods._gram import Split, combination, gram
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting

if TYPE_CHECKING:
    import torch

SMALLEST_NORMS = 1e-6  # a product of two lengths below this is raised to it, which makes the cosine small
SMALLEST_DIVISOR = 1e-6  # |1 + (N-1) c| below this: t = 0


def kernel(inputs: TensorInputs) -> Kernel:
    """base + t mean_i delta_i with t = N c / (1 + (N-1) c), c the mean cosine of all pairs of task vectors.

    t is not clamped: models that point away from each other give t < 0 or t > 1. With `filter_wise` every
    vector along the last dimension, a row of a matrix, has its own t; N^2 numbers of 8 bytes per row are
    remembered.
    """
    by_row = inputs.parameter("filter_wise")
    split = (Split.by_last_dimension if by_row else Split.flat)(inputs.shape)
    products = gram(inputs, split, whole=False)
    return combination(inputs, split, coefficients(products), whole=False)


def coefficients(products: torch.Tensor) -> torch.Tensor:
    """`(N, k)` factors t / N from `(N, N, k)` dot products; Jang 2024, section 4."""
    import torch

    count = len(products)
    lengths = [products[i, i].sqrt() for i in range(count)]
    cosines = [
        (products[i, j] / (lengths[i] * lengths[j]).clamp(min=SMALLEST_NORMS)).clamp(-1.0, 1.0)
        for i, j in combinations(range(count), 2)
    ]
    cosine = torch.stack(cosines).mean(0)
    divisor = 1.0 + (count - 1) * cosine
    small = divisor.abs() < SMALLEST_DIVISOR
    factor = (cosine / divisor.masked_fill(small, 1.0)).masked_fill(small, 0.0)
    return factor.expand(count, -1)


def canonical(setting: Setting) -> Setting:
    """The setting itself."""
    return SPEC.complete(setting, SPEC.name)


SPEC = MethodSpec(
    name="model_stock",
    shared={"filter_wise": ParameterSpec(kind="bool", default=False, doc="a t for every row of a matrix")},
    per_model={},
    canonical=canonical,
    min_models=2,
    mergekit="model_stock",
    source="Jang 2024, arXiv:2403.19522; the mean over pairs is mergekit 0.1.5's",
)

METHODS = (Method(SPEC, kernel, streams=True),)
