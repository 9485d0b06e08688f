"""Optimizers that learn one generation at a time: seats, missing fitnesses, the flip of signs.

A generation is a list of points, told together once each has its fitness. A point is kept as the optimizer
drew it (`Point`), before folding or clipping into bounds, because the optimizer learns from exactly that; it
travels in the proposal's token. A replay hands the recorded points back, so it does not depend on drawing the
same ones again, and goes on bit for bit where the libraries and the processor are the same.

Imports: numpy, `evomerge.errors` and `search`.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import ConfigError
from evomerge.search.axes import Axes, Vector, start_is_known
from evomerge.search.base import Params, Proposal, Start, Value
from evomerge.search.turns import Turns, foreign_history

# After this many generations without any difference in fitness the search stands on a plateau.
FLAT_GENERATIONS = 5
# Below, half a generation is one point and its spread says nothing about a covariance.
SMALLEST_POPULATION = 4


@dataclass(frozen=True)
class Point:
    """One draw, in the optimizer's own coordinates.

    Attributes:
        vector: real coordinates; the unit cube is their feasible part, a draw may lie outside.
        categories: per categorical parameter, the index of the choice.
    """

    vector: tuple[float, ...]
    categories: tuple[int, ...] = ()


class Generations(Turns):
    """Turns in which every `population_size` points are learned together.

    In the first generation the known points take seats (at most half, the best) and are told without being
    asked; the start is its first proposal unless its fitness is known.
    """

    def __init__(self, name: str, axes: Axes, start: Start, population_size: int) -> None:
        if population_size < SMALLEST_POPULATION:
            raise ConfigError(
                f"optimizer `{name}`: population_size is {population_size}, but must be at least "
                f"{SMALLEST_POPULATION}; leave it out for the usual size"
            )
        super().__init__(name)
        self._axes = axes
        self._start = start
        self._starts_with_start = not start_is_known(start)
        self._size = population_size
        self._waiting: list[Point] = []
        self._told: list[tuple[Point, float | None]] = []
        self._flat = 0
        self._stopped = False

    def should_stop(self) -> bool:
        """Whether the distribution has shrunk to nothing or the fitness has stayed flat."""
        return self._stopped

    def _propose(self, number: int) -> Proposal:
        self._begin_generation_if_due(number)
        point = self._waiting[0]
        token = json.dumps({"v": point.vector, "c": point.categories})
        if number == 0 and self._starts_with_start:
            return Proposal(0, dict(self._start.params), token)  # as given, not as folding back rounds it
        return Proposal(number, self._params(point), token)

    def _learn(self, fitness: float | None) -> None:
        self._seat(self._waiting[0], fitness)

    def _restore(self, proposal: Proposal, fitness: float | None) -> None:
        self._begin_generation_if_due(proposal.number)  # moves the generator on as the first session did
        try:
            record = json.loads(proposal.token)
            point = Point(tuple(float(v) for v in record["v"]), tuple(int(c) for c in record["c"]))
            params = self._params(point)
        except (ValueError, KeyError, TypeError, IndexError):
            raise foreign_history(self.name, proposal, "its token is not one of this optimizer") from None
        if clause := self._axes.problem(proposal.params):
            raise foreign_history(self.name, proposal, clause)
        if name := self._axes.difference(params, proposal.params):
            clause = f"parameter `{name}` is {proposal.params[name]}, by its token {params[name]}"
            raise foreign_history(self.name, proposal, clause)
        self._seat(point, fitness)

    def _begin_generation_if_due(self, number: int) -> None:
        if self._waiting:
            return
        points = self._sample()
        if number == 0:
            others = [known for known in self._start.known if dict(known[0]) != dict(self._start.params)]
            others.sort(key=lambda known: known[1], reverse=True)
            self._told = [
                (self._near_point(params), fitness) for params, fitness in others[: self._size // 2]
            ]
            if self._starts_with_start:
                points[0] = self._point(self._start.params)
        self._waiting = points[: self._size - len(self._told)]

    def _near_point(self, params: Params) -> Point:
        """A known point, drawn in towards the start to where samples lie (pycma's `repair_genotype`).

        A point many sigmas away would throw the distribution off in one step; its direction is what counts.
        """
        point = self._point(params)
        centre = np.asarray(self._point(self._start.params).vector)
        away = np.asarray(point.vector) - centre
        n = max(len(away), 1)
        reach = self._start.sigma * (math.sqrt(n) + 2 * n / (n + 2))
        shrink = min(1.0, reach / max(float(np.linalg.norm(away)), 1e-300))
        return Point(tuple((centre + shrink * away).tolist()), point.categories)

    def _seat(self, point: Point, fitness: float | None) -> None:
        self._waiting.pop(0)
        self._told.append((point, fitness))
        if self._waiting:
            return
        told, self._told = self._told, []
        fitnesses = [f for _, f in told]
        costs = costs_of(fitnesses)
        if costs is not None:
            self._flat = 0
            self._stopped = self._update([p for p, _ in told], costs)
        elif any(f is not None for f in fitnesses):
            self._flat += 1
            self._stopped = self._stopped or self._flat >= FLAT_GENERATIONS

    def _params(self, point: Point) -> dict[str, Value]:
        return self._axes.params(self._unit(point), point.categories)

    @abstractmethod
    def _sample(self) -> list[Point]:
        """A generation of `population_size` points."""

    @abstractmethod
    def _update(self, points: Sequence[Point], costs: Sequence[float]) -> bool:
        """Learn a generation, in the order asked, and say whether the optimizer has converged.

        Args:
            points: `population_size` of them.
            costs: finite, smaller is better, not all equal.
        """

    @abstractmethod
    def _point(self, params: Params) -> Point:
        """The point whose parameters these are."""

    @abstractmethod
    def _unit(self, point: Point) -> Vector:
        """A point brought into the unit cube, shape `(n,)`."""


def costs_of(fitnesses: Sequence[float | None]) -> list[float] | None:
    """Fitnesses as costs for a minimiser, or None when they rank nothing.

    A missing fitness becomes a finite cost beyond the worst, by the spread of the others: it ranks last, and
    neither NaN nor infinity reaches a library, where the one sorts anywhere and the other spoils every
    difference. A generation without any fitness, or with equal ones, is a random step if learned: None.
    """
    costs = [-f for f in fitnesses if f is not None]
    if not costs:
        return None
    worst, spread = max(costs), max(costs) - min(costs)
    if spread == 0.0 and len(costs) == len(fitnesses):
        return None
    missing = worst + (spread or max(abs(worst), 1.0))
    return [missing if f is None else -f for f in fitnesses]
