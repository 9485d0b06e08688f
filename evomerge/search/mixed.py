"""CatCMA with margin for real and categorical parameters together, by cmaes.

The joint distribution is a Gaussian over the unit cube and one categorical distribution per categorical
parameter; margins keep both from dying out before the other has settled.

Source: Hamano et al. 2025, arXiv:2504.07884.

Imports: cmaes, numpy, `evomerge.errors` and `search`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cmaes import CatCMAwM
from numpy.typing import NDArray

from evomerge.search.axes import Axes, Vector, check_options, component_seed
from evomerge.search.base import Params, Start
from evomerge.search.generations import Generations, Point

# Share of the first draws that keep a category of the start whatever else is drawn.
START_SHARE = 0.5
# Ties are broken by the order asked, in steps of this part of the spread.
TIE_STEP = 1e-9


class MixedOptimizer(Generations):
    """CatCMAwM on the unit cube of the float parameters and the choices of the categorical ones."""

    def __init__(
        self,
        axes: Axes,
        *,
        seed: int,
        start: Start,
        population_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_options("mixed", options or {}, ())
        size = population_size or 4 + int(3 * math.log(len(axes.parameters)))
        super().__init__("mixed", axes, start, size)
        n, choices = len(axes.floats), [len(c.choices) for c in axes.categoricals]
        self._widest = max(choices, default=0)
        self._cma = CatCMAwM(
            x_space=[[0.0, 1.0]] * n if n else None,
            c_space=choices or None,
            population_size=size,
            mean=axes.unit(start.params) if n else None,
            sigma=start.sigma if n else None,
            cov=np.eye(n) if n else None,
            cat_param=self._start_shares(start) if choices else None,
            seed=component_seed(seed),
        )

    def _start_shares(self, start: Start) -> NDArray[np.float64]:
        """First probabilities, shape `(categoricals, most choices)`, rows padded with 0."""
        shares = np.zeros((len(self._axes.categoricals), self._widest))
        for row, c, index in zip(
            shares, self._axes.categoricals, self._axes.indices(start.params), strict=True
        ):
            row[: len(c.choices)] = (1.0 - START_SHARE) / len(c.choices)
            row[index] += START_SHARE
        return shares

    def _sample(self) -> list[Point]:
        return [self._drawn(self._cma.ask()) for _ in range(self._size)]

    def _drawn(self, solution: CatCMAwM.Solution) -> Point:
        vector = () if solution._v_raw is None else tuple(solution._v_raw.tolist())
        categories = () if solution.c is None else tuple(solution.c.argmax(axis=1).tolist())
        return Point(vector, categories)

    def _update(self, points: Sequence[Point], costs: Sequence[float]) -> bool:
        # CatCMAwM scales its bound penalty by the interquartile range of the costs, and before the first
        # positive one by the median of nothing: ties must not make that range zero.
        step = TIE_STEP * (max(costs) - min(costs))
        # `tell` sorts the list it is given: this one is nobody else's.
        self._cma.tell(
            [
                (self._solution(p), cost + step * i)
                for i, (p, cost) in enumerate(zip(points, costs, strict=True))
            ]
        )
        return bool(self._axes.floats) and bool(self._cma.should_stop())  # without floats it only warns

    def _solution(self, point: Point) -> CatCMAwM.Solution:
        one_hot = np.zeros((len(point.categories), self._widest), dtype=bool)
        one_hot[np.arange(len(point.categories)), list(point.categories)] = True
        vector = np.array(point.vector) if point.vector else None
        return CatCMAwM.Solution(None, None, one_hot if point.categories else None, vector)

    def _point(self, params: Params) -> Point:
        return Point(tuple(self._axes.unit(params).tolist()), self._axes.indices(params))

    def _unit(self, point: Point) -> Vector:
        return np.clip(np.array(point.vector, dtype=np.float64), 0.0, 1.0)
