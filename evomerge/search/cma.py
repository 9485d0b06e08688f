"""CMA-ES for real parameters, by pycma.

pycma works here on unbounded coordinates; folding them into the unit cube is done beside it with its own
`BoundTransform`, which is quadratic at the bounds, so that an optimum on a bound (a weight of zero) is an
inner point for the optimizer. Kept apart, the fold lets a recorded point be told back exactly.

Source: Hansen 2016, arXiv:1604.00772; bounds: pycma `transformations.BoxConstraintsLinQuadTransformation`.

Imports: cma, numpy, `evomerge.errors` and `search`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evomerge.errors import ConfigError
from evomerge.search.axes import Axes, Vector, check_options
from evomerge.search.base import Params, Start
from evomerge.search.generations import FLAT_GENERATIONS, Generations, Point

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Could not import matplotlib")
    import cma

# Options that tune the algorithm; every other one of pycma's is about printing, files, budgets or bounds.
OPTIONS = (
    "CMA_active",
    "CMA_cmean",
    "CMA_diagonal",
    "CMA_mu",
    "CMA_on",
    "CMA_rankmu",
    "CMA_rankone",
    "CSA_dampfac",
    "CSA_squared",
    "maxstd",
    "minstd",
    "tolconditioncov",
    "tolfacupx",
    "tolflatfitness",
    "tolfun",
    "tolfunhist",
    "tolfunrel",
    "tolstagnation",
    "tolx",
)
# Above this many parameters a full covariance costs more evaluations to learn than a merge can afford.
FULL_COVARIANCE_UP_TO = 100


class CmaOptimizer(Generations):
    """CMA-ES in the unit cube of the float parameters."""

    def __init__(
        self,
        axes: Axes,
        *,
        seed: int,
        start: Start,
        population_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if axes.categoricals:
            raise ConfigError(
                f"optimizer `cma` searches real parameters only, but `{axes.categoricals[0].name}` has named "
                "values; use `mixed` or `tpe`, or fix its value"
            )
        _check(options or {})
        # pycma does not support one dimension: a second one, without effect, keeps its formulas valid.
        self._dimensions = max(len(axes.floats), 2)
        super().__init__("cma", axes, start, population_size or 4 + int(3 * math.log(self._dimensions)))
        self._fold = cma.BoundTransform([0.0, 1.0])
        generator = np.random.Generator(np.random.PCG64(seed))
        settings = {
            "popsize": self._size,
            "randn": lambda *shape: generator.standard_normal(shape),
            "seed": math.nan,  # pycma's word for: leave numpy's global generator alone
            "verbose": -10,  # prints nothing, writes nothing, reads no signals file
            "maxiter": math.inf,
            "maxstd": 1 / 3,  # what pycma sets for bounded coordinates
            "tolflatfitness": FLAT_GENERATIONS,
            "CMA_diagonal": len(axes.floats) > FULL_COVARIANCE_UP_TO,
            # Two-point step-size adaptation and mirrors need certain samples back, and a generation told
            # without any fitness is drawn anew.
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "CMA_mirrors": 0,
        }
        centre = np.array(self._point(start.params).vector)
        self._es = cma.CMAEvolutionStrategy(centre, start.sigma, settings | dict(options or {}))

    def _sample(self) -> list[Point]:
        return [Point(tuple(np.asarray(x).tolist())) for x in self._es.ask()]

    def _update(self, points: Sequence[Point], costs: Sequence[float]) -> bool:
        # check_points: known and recorded points are told as they are, though `ask` has not issued them.
        self._es.tell([np.array(p.vector) for p in points], list(costs), check_points=False)
        return bool(self._es.stop())  # counts flat generations itself, so once per generation

    def _point(self, params: Params) -> Point:
        unit = self._axes.unit(params)
        padded = np.concatenate([unit, np.full(self._dimensions - len(unit), 0.5)])
        return Point(tuple(np.asarray(self._fold.inverse(padded)).tolist()))

    def _unit(self, point: Point) -> Vector:
        if len(point.vector) != self._dimensions:
            raise ValueError(f"{len(point.vector)} coordinates, not {self._dimensions}")
        folded: Vector = np.asarray(self._fold.repair(np.array(point.vector)))
        return folded[: len(self._axes.floats)]


def _check(options: Mapping[str, Any]) -> None:
    check_options("cma", options, OPTIONS)
    for key, value in options.items():
        if isinstance(value, str):  # pycma evaluates texts as Python
            raise ConfigError(f"optimizer `cma`: option `{key}` is the text {value!r}; give it a number")
    if not isinstance(options.get("CMA_diagonal", False), bool):
        # After a number of diagonal generations pycma goes on with numpy's global generator.
        raise ConfigError(
            f"optimizer `cma`: option `CMA_diagonal` is {options['CMA_diagonal']}, but must be true or false"
        )
