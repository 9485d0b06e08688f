"""Merges that are linear combinations of the models, with coefficients that come from dot products alone.

The N models of a setting, as whole tensors or as task vectors, have an N x N Gram matrix. It depends on the
sources only, so it is measured once, and every candidate after that costs the combination and no more.

A tensor is one vector, or one vector per row or column: a `Split` says which.

Imports: torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.merge.methods._method import CHUNK, Kernel, TensorInputs
from evomerge.recipe import ParameterSpec

if TYPE_CHECKING:
    import torch

# The shared parameter that tells two forms of a method apart which mergekit tells apart by `base_model`.
TASK_VECTORS = "task_vectors"
FORM = ParameterSpec(
    kind="bool",
    default=True,
    doc="true: task vectors are combined and added to the base (mergekit with a `base_model`); "
    "false: whole models are combined (mergekit without)",
)


@dataclass(frozen=True)
class Split:
    """A tensor of `rows * columns` entries as vectors: its rows (`along` 1) or its columns (`along` 0)."""

    rows: int
    columns: int
    along: int = 1

    @classmethod
    def flat(cls, shape: Sequence[int]) -> Split:
        """The whole tensor as one vector."""
        return cls(1, math.prod(shape))

    @classmethod
    def by_last_dimension(cls, shape: Sequence[int]) -> Split:
        """Vectors run along the last dimension: the rows of a matrix."""
        return cls(math.prod(shape[:-1]), shape[-1]) if shape else cls(1, 1)

    @classmethod
    def by_first_dimension(cls, shape: Sequence[int]) -> Split:
        """Vectors run along the first dimension: the columns of a matrix."""
        return cls(shape[0], math.prod(shape[1:]), along=0) if shape else cls(1, 1)

    @property
    def count(self) -> int:
        """Number of vectors."""
        return self.rows if self.along == 1 else self.columns

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of parts of at most `CHUNK` entries, on which torch uses one thread."""
        height, width = max(1, CHUNK // self.columns), min(CHUNK, self.columns)
        for top in range(0, self.rows, height):
            for left in range(0, self.columns, width):
                yield slice(top, top + height), slice(left, left + width)

    def vector_of(self, low: int, high: int, like: torch.Tensor) -> torch.Tensor:
        """`(high - low,)` number of the vector that each of the flat entries [low, high) belongs to."""
        import torch

        entries = torch.arange(low, high, device=like.device)
        if self.along == 1:
            return entries.div_(self.columns, rounding_mode="floor")
        return entries.remainder_(self.columns)


def gram(inputs: TensorInputs, split: Split, *, whole: bool) -> torch.Tensor:
    """`(N, N, split.count)` float64 dot products of the models' vectors.

    Args:
        inputs: of one tensor.
        split: what a vector is.
        whole: vectors of base + delta instead of delta.
    """
    return inputs.once(("gram", whole, split, *inputs.models), lambda: _measure(inputs, split, whole))


def _measure(inputs: TensorInputs, split: Split, whole: bool) -> torch.Tensor:
    import torch

    count = len(inputs.deltas)
    result = torch.zeros((count, count, split.count), dtype=torch.float64, device=inputs.base.device)
    shape = (split.rows, split.columns)
    base = inputs.base.view(shape)
    for tile in split.tiles():
        part = base[tile]
        origin = part.to(inputs.dtype) if whole else None
        low = tile[0].start * split.columns + tile[1].start  # a tile is one range of the flat tensor
        entries = slice(low, low + part.numel())
        deltas = [None if delta is None else delta[entries].view(part.shape) for delta in inputs.deltas]
        vectors = [_vector(origin, delta) for delta in deltas]
        place = tile[0] if split.along == 1 else tile[1]
        for i, one in enumerate(vectors):
            for j, other in enumerate(vectors[: i + 1]):
                if one is not None and other is not None:
                    result[i, j, place] += (one * other).sum(split.along)
    for i in range(count):
        result[:i, i] = result[i, :i]
    return result


def _vector(origin: torch.Tensor | None, delta: torch.Tensor | None) -> torch.Tensor | None:
    """Origin + delta in float64, rounded to the working dtype first, as the model's tensor is."""
    if origin is None:
        return None if delta is None else delta.double()
    return (origin if delta is None else origin + delta).double()


def combination(inputs: TensorInputs, split: Split, factors: torch.Tensor, *, whole: bool) -> Kernel:
    """sum_i f_i theta_i (`whole`), or base + sum_i f_i delta_i; `factors` `(N, split.count)` float64."""
    if split.count == 1:
        return flat_combination(inputs, factors[:, 0].tolist(), whole=whole)
    rows, total = factors.to(inputs.dtype), factors.sum(0).to(inputs.dtype)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        vector = split.vector_of(low, high, out)
        if whole:
            out.mul_(total[vector])
        for row, delta in zip(rows, inputs.deltas, strict=True):
            if delta is not None:
                out.addcmul_(row[vector], delta[low:high])

    return run


def flat_combination(inputs: TensorInputs, factors: list[float], *, whole: bool) -> Kernel:
    """`combination` with one factor per model."""
    total = math.fsum(factors)
    terms = [(f, d) for f, d in zip(factors, inputs.deltas, strict=True) if d is not None and f != 0.0]

    def run(low: int, high: int, out: torch.Tensor) -> None:
        if whole:  # theta_i = base + delta_i, so the base has all the factors
            out.mul_(total)
        for factor, delta in terms:
            out.add_(delta[low:high], alpha=factor)

    return run


def flat_gram(inputs: TensorInputs, *, whole: bool) -> list[list[float]]:
    """`gram` of the flat tensors, as nested lists."""
    rows: list[list[float]] = gram(inputs, Split.flat(inputs.shape), whole=whole)[:, :, 0].tolist()
    return rows
