"""Sums over the entries of a cell, and the numbers that follow from them.

delta is a task vector, `model - base` in float32; every sum is a float64 or a whole number. Sums of tensors
add up to those of their cell, of a layer, of a module and of the whole model, so one pass fills them all.

Imports: `evomerge.recipe`; never torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self, TypeVar

from evomerge.recipe import Cell

By = Literal["all", "layer", "module", "cell"]
VARIES = 1e-12  # smallest share of the squares that varies, below which a vector counts as constant


@dataclass(frozen=True)
class _Sums:
    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class ModelSums(_Sums):
    """One task vector.

    Attributes:
        entries: number of entries.
        base_squares: sum of the base's squared entries.
        squares: sum of delta's squared entries.
        changed: entries where delta is not zero.
        tied: of these, the ones whose magnitude another entry of the same tensor has too.
    """

    entries: int = 0
    base_squares: float = 0.0
    squares: float = 0.0
    changed: int = 0
    tied: int = 0

    @property
    def norm(self) -> float:
        """L2 norm of delta."""
        return math.sqrt(self.squares)

    @property
    def base_norm(self) -> float:
        """L2 norm of the base."""
        return math.sqrt(self.base_squares)

    @property
    def relative_norm(self) -> float | None:
        """`norm / base_norm`; None for a base of zeros."""
        return _ratio(self.norm, self.base_norm)

    @property
    def changed_share(self) -> float | None:
        """Share of the entries that changed, in [0, 1]; None without entries."""
        return _ratio(self.changed, self.entries)

    @property
    def tied_share(self) -> float | None:
        """Share of the non-zero entries with an equal magnitude in their tensor; None when all are zero."""
        return _ratio(self.tied, self.changed)

    def as_json(self) -> dict[str, float | int | None]:
        """Every number by name."""
        return {
            "norm": self.norm,
            "base_norm": self.base_norm,
            "relative_norm": self.relative_norm,
            "entries": self.entries,
            "changed": self.changed,
            "changed_share": self.changed_share,
            "equal_magnitudes": self.tied,
            "equal_magnitudes_share": self.tied_share,
        }


@dataclass(frozen=True)
class PairSums(_Sums):
    """Two task vectors a and b over the entries that both models have.

    Source of `pcc`, `cs` and `ed`: model kinship, Hu et al. 2024 (arXiv:2410.12613).

    Attributes:
        entries: number of entries.
        total_a, total_b: sums of the entries.
        squares_a, squares_b: sums of the squared entries.
        dot: sum of the products.
        distance_squares: sum of `(a - b)**2`.
        both: entries where neither is zero.
        conflicts: of these, the ones with opposite signs.
    """

    entries: int = 0
    total_a: float = 0.0
    total_b: float = 0.0
    squares_a: float = 0.0
    squares_b: float = 0.0
    dot: float = 0.0
    distance_squares: float = 0.0
    both: int = 0
    conflicts: int = 0

    @property
    def cosine(self) -> float | None:
        """`a.b / (|a| |b|)`, in [-1, 1]; None when one is zero."""
        return _correlation(self.dot, self.squares_a, self.squares_b)

    @property
    def pcc(self) -> float | None:
        """Pearson correlation, in [-1, 1]; None when one is constant."""
        if self.entries == 0:
            return None
        centred = [
            (squares - total**2 / self.entries, squares)
            for squares, total in ((self.squares_a, self.total_a), (self.squares_b, self.total_b))
        ]
        if any(variation <= VARIES * squares for variation, squares in centred):
            return None
        covariation = self.dot - self.total_a * self.total_b / self.entries
        return _correlation(covariation, centred[0][0], centred[1][0])

    @property
    def cs(self) -> float | None:
        """Absolute cosine, in [0, 1]; None when one is zero."""
        return None if self.cosine is None else abs(self.cosine)

    @property
    def ed(self) -> float:
        """Euclidean distance `|a - b|`."""
        return math.sqrt(self.distance_squares)

    @property
    def sign_conflict(self) -> float | None:
        """Share of opposite signs among the entries where neither is zero; None without such entries."""
        return _ratio(self.conflicts, self.both)

    def as_json(self) -> dict[str, float | int | None]:
        """Every number by name."""
        return {
            "cosine": self.cosine,
            "pcc": self.pcc,
            "cs": self.cs,
            "ed": self.ed,
            "sign_conflict": self.sign_conflict,
            "both_changed": self.both,
            "entries": self.entries,
        }


S = TypeVar("S", ModelSums, PairSums)


def grouped(cells: Mapping[Cell, S], by: By) -> dict[str, S]:
    """Sums of the cells, added up by `by`; the label of cells outside the numbered layers is "none".

    "all" has the one label "all" and is there even when no cell is.
    """
    groups: dict[str, S] = {}
    for cell, sums in cells.items():
        label = label_of(cell, by)
        groups[label] = groups[label] + sums if label in groups else sums
    return groups


def label_of(cell: Cell, by: By) -> str:
    """Label of the group that `cell` belongs to."""
    if by == "layer":
        return "none" if cell.layer is None else str(cell.layer)
    return {"all": "all", "module": cell.module, "cell": str(cell)}[by]


def total(cells: Mapping[Cell, S], empty: S) -> S:
    """Sum over all cells, `empty` when there is none."""
    return grouped(cells, "all").get("all", empty)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _correlation(product: float, squares_a: float, squares_b: float) -> float | None:
    """product / sqrt(squares_a * squares_b), with rounding beyond [-1, 1] cut off."""
    if squares_a <= 0 or squares_b <= 0:
        return None
    return max(-1.0, min(1.0, product / (math.sqrt(squares_a) * math.sqrt(squares_b))))
