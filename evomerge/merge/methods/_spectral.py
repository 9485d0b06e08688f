"""Singular directions of task vectors, for methods that work on matrices.

A direction counts when its singular value is above max(m, k) * eps * (the largest one): the numerical rank.
The task vector of a LoRA adapter has a numerical rank of at most r; it is found with a random sketch (Halko
2011, arXiv:0909.4061, algorithm 4.1), whose residual is checked, at the cost of a few thin products instead
of a decomposition of the whole matrix. An adapter that was merged into a checkpoint in bfloat16 has full
rank, because the rounding of its sum with the base has.

Imports: `evomerge.errors`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from evomerge.errors import RecipeError
from evomerge.merge.methods._method import TensorInputs
from evomerge.merge.methods._vectors import Part, is_vocabulary

if TYPE_CHECKING:
    import torch

SKETCH = 128  # directions that the sketch can find; smaller matrices are decomposed at once


class Factors(NamedTuple):
    """`u @ diag(s) @ vh` with u `(m, p)`, s `(p,)`, vh `(p, k)`; columns of u and rows of vh orthonormal."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Memory in bytes: (m + k + 1) p entries."""
        return self.u.nbytes + self.s.nbytes + self.vh.nbytes


def works_on(inputs: TensorInputs) -> bool:
    """Whether the tensor is a matrix whose singular directions are merged: not an embedding or a head."""
    return len(inputs.shape) == 2 and not is_vocabulary(inputs.name)


def low_rank(inputs: TensorInputs, part: Part) -> Factors | None:
    """The directions of one task vector, remembered, where its numerical rank is well below SKETCH, or None.

    What is remembered has (m + k + 1) p entries for rank p <= SKETCH, and nothing for None.
    """
    matrix = part.delta.reshape(inputs.shape)
    return inputs.once(("low rank", part.model), lambda: sketch(matrix, inputs.where))


def directions(inputs: TensorInputs, part: Part) -> Factors:
    """All directions of one task vector up to its numerical rank."""
    low = low_rank(inputs, part)
    return decompose(part.delta.reshape(inputs.shape), inputs.where) if low is None else low


def sketch(matrix: torch.Tensor, where: str) -> Factors | None:
    """`decompose(matrix)` by way of a random projection, None where SKETCH directions do not hold it all."""
    import torch

    if min(matrix.shape) < 2 * SKETCH:
        return None
    # drawn on the CPU by a generator of its own: the same numbers on every device
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], SKETCH, generator=generator).to(matrix)
    q = torch.linalg.qr(matrix @ probe).Q
    inner = q.mT @ matrix
    u, s, vh = decompose(inner, where, tolerance(matrix))
    # singular values that the sketch misses are at most the norm of what is left
    if torch.linalg.vector_norm(matrix - q @ inner) > tolerance(matrix) * s[0]:
        return None
    return Factors(q @ u, s, vh)


def decompose(matrix: torch.Tensor, where: str, relative: float | None = None) -> Factors:
    """The thin SVD up to the numerical rank.

    Args:
        matrix: `(m, k)`, float32 or float64, not all zero.
        where: cell and tensor, for messages.
        relative: singular values up to this times the largest do not count; `tolerance(matrix)` for None.
    """
    u, s, vh = svd(matrix, where)
    rank = int((s > (tolerance(matrix) if relative is None else relative) * s[0]).sum())
    return Factors(u[:, :rank].clone(), s[:rank].clone(), vh[:rank].clone())


def svd(matrix: torch.Tensor, where: str) -> Factors:
    """The thin SVD with all min(m, k) directions.

    Raises:
        RecipeError: the matrix holds values that are not finite, or its SVD does not converge.
    """
    import torch

    try:
        return Factors(*torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise RecipeError(
            f"{where}: the singular directions of the task vectors cannot be computed ({error}); a source "
            "holds values that are not finite, or use another method for this cell"
        ) from error


def tolerance(matrix: torch.Tensor) -> float:
    """Singular values up to this times the largest are rounding."""
    import torch

    return float(max(matrix.shape) * torch.finfo(matrix.dtype).eps)


def polar(matrix: torch.Tensor, where: str) -> torch.Tensor:
    """The orthogonal factor P Q^T of the thin SVD P S Q^T, over the numerical rank, where it is unique."""
    u, _, vh = decompose(matrix, where)
    return u @ vh
