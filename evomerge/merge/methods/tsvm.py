"""TSV-M: keep each task vector's strongest singular directions, and make those of all models orthogonal.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from evomerge.merge.methods._gta import LAMBDA, WEIGHT
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.merge.methods._spectral import directions, polar, works_on
from evomerge.merge.methods._vectors import (
    Part,
    add_mean,
    add_whole,
    alone,
    fold_lambda,
    keep_base,
    n_models,
    parts,
)
from evomerge.recipe import MethodSpec, Setting

if TYPE_CHECKING:
    import torch


class Basis(NamedTuple):
    """Orthogonal directions of several models: u `(m, P)`, vh `(P, k)`; `values` has one row per model."""

    u: torch.Tensor
    values: tuple[torch.Tensor, ...]
    vh: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory in bytes: about (m + k) P entries."""
        return self.u.nbytes + self.vh.nbytes + sum(row.nbytes for row in self.values)


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda U' diag(w_1 S_1, .., w_N S_N) V' for matrices; the mean of w_i delta_i else.

    U_i S_i V_i are the q = min(m, k) // N strongest directions of delta_i, at least one and no more than its
    numerical rank; U' and V' are the orthogonal polar factors of all U_i and all V_i side by side. One model
    alone is unchanged. Embeddings and output heads get the mean, as tensors that are no matrices do:
    their singular directions are those of tokens, and as costly as they are large.

    Weights are ours: w_i delta_i in the place of delta_i; the paper has w_i = 1.

    U' and V' do not depend on the weights and are remembered: (m + k) N q entries at most, those of two
    task vectors where m = k; much less for adapters.
    """
    import torch

    models, rows, scale = n_models(inputs), parts(inputs), inputs.parameter("lambda")
    if not rows:
        return keep_base
    if models == 1 or not works_on(inputs):
        return add_mean(inputs)
    count = max(1, min(inputs.shape) // models)
    key = ("tsvm", count, *(part.model for part in rows))
    basis = inputs.once(key, lambda: orthogonal(inputs, rows, count))
    values = torch.cat([row * (scale * part.weight) for row, part in zip(basis.values, rows, strict=True)])
    return add_whole((basis.u * values) @ basis.vh)


def orthogonal(inputs: TensorInputs, rows: Sequence[Part], count: int) -> Basis:
    """The `count` strongest directions of each model, made orthogonal; Gargiulo 2024, section 3.3."""
    import torch

    found = [directions(inputs, part) for part in rows]
    u = torch.cat([factors.u[:, :count] for factors in found], dim=1)
    vh = torch.cat([factors.vh[:count] for factors in found])
    # copies: a slice would keep all of the memory that it is a part of
    values = tuple(factors.s[:count].clone() for factors in found)
    return Basis(polar(u, inputs.where), values, polar(vh, inputs.where))


def canonical(setting: Setting) -> Setting:
    """`lambda` folded into the weights; one model alone is task arithmetic."""
    setting = fold_lambda(SPEC.complete(setting, SPEC.name))
    return alone(setting) if len(setting.models) == 1 else setting


SPEC = MethodSpec(
    name="tsvm",
    shared={"lambda": LAMBDA},
    per_model={"weight": WEIGHT},
    canonical=canonical,
    source="Gargiulo 2024, arXiv:2412.00081 (TSV-Merge; lambda is its alpha)",
)

METHODS = (Method(SPEC, kernel),)
