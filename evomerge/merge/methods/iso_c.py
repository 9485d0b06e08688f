"""Iso-C: sum the task vectors and give all singular directions of the sum the same, mean, strength.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evomerge.merge.methods._gta import LAMBDA, WEIGHT
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.merge.methods._spectral import Factors, decompose, low_rank, svd, tolerance, works_on
from evomerge.merge.methods._vectors import Part, add_mean, add_whole, fold_lambda, keep_base, parts
from evomerge.recipe import MethodSpec, ParameterSpec, Setting

if TYPE_CHECKING:
    import torch

FULL_RANK = ParameterSpec(
    kind="bool",
    default=False,
    doc="spread the mean over all min(m, k) directions as published, noise directions included",
)


class Span(NamedTuple):
    """sum_i w_i delta_i = u @ left @ diag(w values) @ right.T @ vh; u `(m, P)`, vh `(P, k)` orthonormal."""

    u: torch.Tensor
    left: torch.Tensor
    values: tuple[torch.Tensor, ...]
    right: torch.Tensor
    vh: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory in bytes: about (m + k + 2 P) P entries."""
        tensors = (self.u, self.left, *self.values, self.right, self.vh)
        return sum(tensor.nbytes for tensor in tensors)


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda mean(S) P Q with P S Q the SVD of sum_i w_i delta_i, for matrices.

    Embeddings, output heads and tensors that are no matrices get base + lambda (sum_i w_i delta_i) / N.
    The mean and the product are over the numerical rank of the sum, or over all min(m, k) directions with
    `full_rank`. The two differ where the sum has a low rank, as that of LoRA adapters: there the paper's
    form moves most of the strength into directions that are nothing but rounding.

    Weights are ours: w_i delta_i in the place of delta_i; the paper has w_i = 1.

    The sum changes with the weights, and with it the SVD: adapters cost one of a few dozen rows and columns
    per candidate (remembered: about (m + k) P entries, P the sum of the ranks), full models one of the
    whole matrix.
    """
    rows, scale = parts(inputs), inputs.parameter("lambda")
    if not rows:
        return keep_base
    if not works_on(inputs):
        return add_mean(inputs)
    full = inputs.parameter("full_rank")
    found = None if full else summed_span(inputs, rows)
    factors = summed(inputs, rows, full) if found is None else found
    if not factors.s.numel() or not factors.s[0]:
        return keep_base
    return add_whole((factors.u * (scale * factors.s.mean())) @ factors.vh)


def summed(inputs: TensorInputs, rows: Sequence[Part], full: bool) -> Factors:
    """Directions of sum_i w_i delta_i from the sum itself."""
    import torch

    total = torch.zeros(inputs.shape, dtype=inputs.dtype, device=inputs.base.device)
    for part in rows:
        total.add_(part.delta.reshape(inputs.shape), alpha=part.weight)
    return svd(total, inputs.where) if full else decompose(total, inputs.where)


def summed_span(inputs: TensorInputs, rows: Sequence[Part]) -> Factors | None:
    """The same from the models' own directions, where they are few; None where they are not."""
    import torch

    found = [low_rank(inputs, part) for part in rows]
    low = [factors for factors in found if factors is not None]
    if len(low) < len(found) or 2 * sum(factors.s.numel() for factors in low) > min(inputs.shape):
        return None
    key = ("iso_c", *(part.model for part in rows))
    span = inputs.once(key, lambda: spanned(low))
    values = torch.cat([row * part.weight for row, part in zip(span.values, rows, strict=True)])
    core = (span.left * values) @ span.right.mT
    u, s, vh = decompose(core, inputs.where, tolerance(rows[0].delta.reshape(inputs.shape)))
    return Factors(span.u @ u, s, vh @ span.vh)


def spanned(low: Sequence[Factors]) -> Span:
    """Orthonormal directions that hold those of every model."""
    import torch

    left = torch.linalg.qr(torch.cat([factors.u for factors in low], dim=1))
    right = torch.linalg.qr(torch.cat([factors.vh for factors in low]).mT)
    return Span(left.Q, left.R, tuple(factors.s for factors in low), right.R, right.Q.mT)


def canonical(setting: Setting) -> Setting:
    """`lambda` folded into the weights."""
    return fold_lambda(SPEC.complete(setting, SPEC.name))


SPEC = MethodSpec(
    name="iso_c",
    shared={"lambda": LAMBDA, "full_rank": FULL_RANK},
    per_model={"weight": WEIGHT},
    canonical=canonical,
    source="Marczak 2025, arXiv:2502.04959 (Iso-C; lambda is its alpha); restricted to the numerical rank",
)

METHODS = (Method(SPEC, kernel),)
