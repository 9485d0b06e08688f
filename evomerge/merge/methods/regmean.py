"""RegMean: the linear layer whose outputs are nearest to those of every model on that model's own inputs.

Imports: `evomerge.errors`, `evomerge.recipe`, `evomerge.sources.statistics`; torch inside functions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.errors import RecipeError
from evomerge.merge.methods._measured import SHARE, Measured, average, canonical_shares, measured, shares
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.merge.methods._vectors import add_whole
from evomerge.recipe import MethodSpec, ParameterSpec, Setting
from evomerge.sources.statistics import GRAM

if TYPE_CHECKING:
    import torch

OFF_DIAGONAL = ParameterSpec(
    low=0.0,
    high=1.0,
    default=0.9,
    doc="the factor of the Gram matrices' entries off the diagonal (the paper's alpha)",
)
RIDGE = ParameterSpec(
    low=0.0,
    default=1e-6,
    doc="how far directions without inputs are pulled to the plain average, relative to the mean diagonal",
)


def kernel(inputs: TensorInputs) -> Kernel:
    """W^T = (sum_i w_i G~_i)^-1 sum_i w_i G~_i W_i^T with G~ = a G + (1 - a) diag(G), a = `off_diagonal`.

    W_i `(outputs, k)`, G_i `(k, k)` the Gram matrix of the layer's inputs in model i. `ridge` times the
    mean diagonal of the sum is added to it on the left, and as much of sum_i w_i W_i^T on the right:
    directions that no input has would be undetermined without it. The paper has 0, and w_i = 1.

    A tensor without Gram matrices (norms, embeddings, biases) is the weighted average of the models.
    Solved in float64 for every candidate: k^3 / 3 + 2 k^2 outputs multiplications, and memory of three
    `(k, k)` and two `(k, outputs)` matrices.

    Raises:
        RecipeError: all weights are 0, or the sum is singular.
    """
    weights = shares(inputs)
    rows = measured(inputs, GRAM, weights)
    if rows is None or len(inputs.shape) != 2 or all(row.delta is None for row in rows):
        return average(inputs, weights)
    return add_whole(solved(inputs, rows))


def solved(inputs: TensorInputs, rows: Sequence[Measured]) -> torch.Tensor:
    """W - base, `(outputs, k)`: the formula is linear in W_i, so it holds for differences from the base."""
    import torch

    outputs, k = inputs.shape
    left = torch.zeros((k, k), dtype=torch.float64, device=inputs.base.device)
    right, mean = left.new_zeros((k, outputs)), left.new_zeros((k, outputs))
    for _, weight, gram, delta in rows:
        reduced = gram.double() * (inputs.parameter("off_diagonal") * weight)
        reduced.diagonal().copy_(gram.diagonal().double() * weight)
        left += reduced
        if delta is not None:
            moved = delta[:].reshape(inputs.shape).mT.double()
            right.addmm_(reduced, moved)
            mean.add_(moved, alpha=weight)
    pull = float(inputs.parameter("ridge") * left.diagonal().mean())
    left.diagonal().add_(pull)
    right.add_(mean, alpha=pull)
    factor, failed = torch.linalg.cholesky_ex(left)
    if failed:
        raise RecipeError(
            f"{inputs.where}: the sum of the Gram matrices is singular, so regmean has no solution; raise "
            "`ridge`, lower `off_diagonal`, or make the statistics from more texts"
        )
    return torch.cholesky_solve(right, factor).mT.to(inputs.dtype)


def canonical(setting: Setting) -> Setting:
    """Weights that sum to 1; one model alone is copied."""
    return canonical_shares(SPEC.complete(setting, SPEC.name))


SPEC = MethodSpec(
    name="regmean",
    shared={"off_diagonal": OFF_DIAGONAL, "ridge": RIDGE},
    per_model={"weight": SHARE},
    canonical=canonical,
    min_models=1,
    needs=GRAM,
    source="Jin 2022, arXiv:2212.09849; weights and a ridge toward the average are ours",
)

METHODS = (Method(SPEC, kernel),)
