"""From item scores to one fitness, and what may be said of a difference between two recipes.

Larger is better. Standard errors and bootstrap intervals speak of the sampling of items: they answer
"what if other items of the same kind had been drawn?". A task's best source score, where one is used, is
taken as a constant.

Imports: `evomerge.errors`, numpy; never torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from evomerge.errors import FitnessError

Aggregate = Literal["mean", "min", "normalized"]
Values = Mapping[str, Mapping[str, float]]  # task -> item id -> value
Array = npt.NDArray[np.float64]

_CHUNK = 2**20  # resampled values held at a time; 16 MiB with their indices


@dataclass(frozen=True)
class ItemScore:
    """One item's value with its evidence.

    Attributes:
        task: name of the task.
        item: id of the item.
        value: larger is better; in [0, 1] but for the nll scorer.
        completion: the engine's text, or the chosen one; empty where only a likelihood was asked for.
        tokens: tokens that the engine generated or scored.
    """

    task: str
    item: str
    value: float
    completion: str
    tokens: int


class Score(NamedTuple):
    """A task's score; `stderr` is the sample standard deviation / sqrt(n), None when n < 2."""

    mean: float
    stderr: float | None
    n: int


class Fitness(NamedTuple):
    """What the search maximises; `stderr` is None when a task has none."""

    value: float
    stderr: float | None


class Estimate(NamedTuple):
    """A fitness with its bootstrap interval."""

    value: float
    low: float
    high: float


class Interval(NamedTuple):
    """A difference in fitness with its bootstrap interval and two-sided p-value for no difference."""

    difference: float
    low: float
    high: float
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the first is better than the second: the whole interval lies above 0."""
        return self.low > 0


def values_by_task(scores: Iterable[ItemScore]) -> dict[str, dict[str, float]]:
    """Task -> item id -> value; `FitnessError` when an item was scored twice."""
    result: dict[str, dict[str, float]] = {}
    for score in scores:
        if score.item in result.setdefault(score.task, {}):
            raise FitnessError(f"task `{score.task}`, item `{score.item}` was scored twice; score it once")
        result[score.task][score.item] = score.value
    return result


def score_tasks(scores: Iterable[ItemScore]) -> dict[str, Score]:
    """The `Score` of each task that occurs in `scores`."""
    result = {}
    for task, values in values_by_task(scores).items():
        array, n = np.array(list(values.values())), len(values)
        stderr = float(array.std(ddof=1)) / math.sqrt(n) if n > 1 else None
        result[task] = Score(float(array.mean()), stderr, n)
    return result


def aggregate(
    scores: Mapping[str, Score],
    weights: Mapping[str, float],
    kind: Aggregate,
    best_source: Mapping[str, float] | None = None,
) -> Fitness:
    """One fitness from the scores of all tasks.

    mean: sum(w_t s_t) / sum(w_t). min: the smallest s_t, whatever the weights. normalized: the mean of
    r_t = 1 + (s_t - b_t) / |b_t|, with b_t the best source's score: s_t / b_t for positive scores, and
    still increasing in s_t when scores are negative, as those of nll are. A task with b_t = 0 keeps
    r_t = s_t: there is nothing to divide by.

    The standard error follows the delta method with tasks independent, sqrt(sum((w_t c_t e_t / sum(w))^2)),
    c_t = 1 or 1/|b_t|; that of min is the smallest task's.

    Raises:
        FitnessError: a task has no weight, there is no task, or `best_source` lacks a task it must have.
    """
    tasks = list(scores)
    combine = _Combine.of(tasks, weights, kind, best_source)
    means = np.array([[scores[task].mean for task in tasks]])
    value = float(combine(means)[0])
    if kind == "min":
        return Fitness(value, scores[tasks[int(means.argmin())]].stderr)
    errors = [scores[task].stderr for task in tasks]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return Fitness(value, None)
    return Fitness(value, float(np.linalg.norm(combine.slopes() * np.array(known))))


def paired_bootstrap(
    a: Values,
    b: Values,
    weights: Mapping[str, float],
    kind: Aggregate,
    seed: int,
    *,
    best_source: Mapping[str, float] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Difference in fitness of `a` and `b` on the same items, with a percentile interval.

    Items are resampled with replacement within each task, the same ones for both. The result depends on
    the values and the seed only, not on the order of tasks or items. The p-value is twice the smaller tail
    of the resampled differences at 0, each tail counted with one more, at most 1.

    Args:
        a, b: task -> item id -> value, with the same tasks and items.
        weights, kind, best_source: as in `aggregate`.
        seed: of a numpy Generator of its own.
        resamples: number of resamples, at least 1.
        level: coverage, in (0, 1).

    Raises:
        FitnessError: different tasks or items, a task with fewer than two items, or as in `aggregate`.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 (percentile interval)
    and 16 (one more in the count of a tail: Davison and Hinkley 1997, equation 4.11).
    """
    _check_same_items(a, b)
    tasks = sorted(a)
    combine = _Combine.of(tasks, weights, kind, best_source)
    pairs = [np.array([[a[task][item], b[task][item]] for item in sorted(a[task])]) for task in tasks]
    means = _resampled_means(tasks, pairs, seed, resamples)
    differences = combine(means[..., 0]) - combine(means[..., 1])
    observed = np.array([pair.mean(axis=0) for pair in pairs])[None]
    difference = float((combine(observed[..., 0]) - combine(observed[..., 1]))[0])
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    low, high = _percentiles(differences, level)
    return Interval(difference, low, high, min(1.0, 2 * (tail + 1) / (resamples + 1)))


def interval(
    a: Values,
    weights: Mapping[str, float],
    kind: Aggregate,
    seed: int,
    *,
    best_source: Mapping[str, float] | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Estimate:
    """The fitness of `a` with a percentile interval; arguments and errors as in `paired_bootstrap`."""
    tasks = sorted(a)
    combine = _Combine.of(tasks, weights, kind, best_source)
    columns = [np.array([[a[task][item]] for item in sorted(a[task])]) for task in tasks]
    low, high = _percentiles(combine(_resampled_means(tasks, columns, seed, resamples)[..., 0]), level)
    value = float(combine(np.array([[column.mean() for column in columns]]))[0])
    return Estimate(value, low, high)


class _Combine(NamedTuple):
    """Task means, `(..., tasks)`, to fitness, `(...)`; the formula of `aggregate`, for many rows at once."""

    kind: Aggregate
    shares: Array  # w_t / sum(w), (tasks,)
    best: Array  # b_t; 0 where a task is not normalised, (tasks,)

    @classmethod
    def of(
        cls,
        tasks: list[str],
        weights: Mapping[str, float],
        kind: Aggregate,
        best_source: Mapping[str, float] | None,
    ) -> _Combine:
        if not tasks:
            raise FitnessError("no task has a score; score at least one item")
        best = (best_source or {}) if kind == "normalized" else dict.fromkeys(tasks, 0.0)
        for table, name in ((weights, "weight"), (best, "best source score")):
            missing = [task for task in tasks if task not in table]
            if missing:
                raise FitnessError(f"task `{missing[0]}` has no {name}; give one for every task")
        share = np.array([weights[task] for task in tasks], dtype=np.float64)
        return cls(kind, share / share.sum(), np.array([best[task] for task in tasks], dtype=np.float64))

    def slopes(self) -> Array:
        """Derivative of the fitness by each task's mean, for the linear kinds."""
        result: Array = self.shares / np.where(self.best == 0, 1.0, np.abs(self.best))
        return result

    def __call__(self, means: Array) -> Array:
        if self.kind == "min":
            smallest: Array = means.min(axis=-1)
            return smallest
        # 1 + (s - b)/|b| = s/|b| + (1 - sign b)
        offset = np.where(self.best == 0, 0.0, 1.0 - np.sign(self.best))
        result: Array = means @ self.slopes() + float(self.shares @ offset)
        return result


def _resampled_means(tasks: list[str], columns: list[Array], seed: int, resamples: int) -> Array:
    """`(resamples, tasks, k)` from one `(items, k)` array per task; each task draws from its own stream."""
    result = np.empty((resamples, len(columns), columns[0].shape[1]))
    streams = np.random.SeedSequence(seed).spawn(len(columns))
    for position, (task, column, stream) in enumerate(zip(tasks, columns, streams, strict=True)):
        n = len(column)
        if n < 2:
            raise FitnessError(f"task `{task}` has {n} items, but an interval needs at least 2; add items")
        generator = np.random.default_rng(stream)
        step = max(1, _CHUNK // n)
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            drawn = generator.integers(n, size=(rows, n))
            for k in range(column.shape[1]):
                result[start : start + rows, position, k] = column[:, k][drawn].mean(axis=1)
    return result


def _percentiles(values: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_same_items(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]]) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise FitnessError(f"task `{odd[0]}` was scored for one recipe only; score both on the same tasks")
    for task in a:
        if a[task].keys() != b[task].keys():
            odd = sorted(a[task].keys() ^ b[task].keys())
            raise FitnessError(
                f"task `{task}`: item `{odd[0]}` was scored for one recipe only ({len(odd)} such items); "
                "score both on the same items"
            )
