"""Statistics against textbook formulas, SciPy's bootstrap and their coverage on simulated data."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import scipy.stats

from evomerge.errors import FitnessError
from evomerge.evaluate import score as module
from evomerge.evaluate.score import (
    ItemScore,
    Score,
    aggregate,
    interval,
    paired_bootstrap,
    score_tasks,
)

ONE = {"t": 1.0}


def by_item(values):
    return {f"i{position:04}": float(value) for position, value in enumerate(values)}


def two_recipes(seed=0, n=80, gain=0.1):
    """Values of two recipes on the same items: correlated, as those of neighbours in a search are."""
    generator = np.random.default_rng(seed)
    hard = generator.normal(size=n)
    b = hard + generator.normal(scale=0.5, size=n)
    return hard + gain + generator.normal(scale=0.5, size=n), b


# --- score and aggregate


def test_a_score_has_mean_standard_error_and_count():
    values = [0.0, 1.0, 1.0, 0.5]
    scores = score_tasks([ItemScore("t", str(i), value, "", 1) for i, value in enumerate(values)])
    assert scores["t"].mean == pytest.approx(statistics.mean(values))
    assert scores["t"].stderr == pytest.approx(statistics.stdev(values) / math.sqrt(4))
    assert scores["t"].n == 4


def test_one_item_has_no_standard_error():
    assert score_tasks([ItemScore("t", "a", 1.0, "", 1)])["t"] == Score(1.0, None, 1)


def test_an_item_scored_twice_is_refused():
    with pytest.raises(FitnessError, match="task `t`, item `a` was scored twice"):
        score_tasks([ItemScore("t", "a", 1.0, "", 1)] * 2)


SCORES = {"a": Score(0.8, 0.03, 50), "b": Score(0.2, 0.04, 50)}
WEIGHTS = {"a": 1.0, "b": 3.0}


def test_mean_is_weighted_and_errors_add_in_quadrature():
    fitness = aggregate(SCORES, WEIGHTS, "mean")
    assert fitness.value == pytest.approx((0.8 + 3 * 0.2) / 4)
    assert fitness.stderr == pytest.approx(math.sqrt(0.03**2 + (3 * 0.04) ** 2) / 4)


def test_min_is_the_smallest_task_with_its_error():
    assert aggregate(SCORES, WEIGHTS, "min") == (0.2, 0.04)


def test_normalized_divides_by_the_best_source():
    fitness = aggregate(SCORES, WEIGHTS, "normalized", {"a": 0.5, "b": 0.4})
    assert fitness.value == pytest.approx((0.8 / 0.5 + 3 * 0.2 / 0.4) / 4)
    assert fitness.stderr == pytest.approx(math.sqrt((0.03 / 0.5) ** 2 + (3 * 0.04 / 0.4) ** 2) / 4)


def test_normalized_leaves_a_task_alone_whose_best_source_has_zero():
    fitness = aggregate(SCORES, WEIGHTS, "normalized", {"a": 0.5, "b": 0.0})
    assert fitness.value == pytest.approx((0.8 / 0.5 + 3 * 0.2) / 4)


def test_normalized_is_one_at_the_best_source_and_grows_with_negative_scores():
    worse, same, better = (
        aggregate({"t": Score(s, 0.1, 9)}, ONE, "normalized", {"t": -0.8}).value for s in (-0.9, -0.8, -0.7)
    )
    assert same == pytest.approx(1)
    assert worse == pytest.approx(1 - 0.125)
    assert better == pytest.approx(1 + 0.125)


@pytest.mark.parametrize("kind", ["mean", "min", "normalized"])
def test_the_error_of_the_aggregate_is_that_of_simulated_scores(kind):
    generator = np.random.default_rng(0)
    best = {"a": 0.5, "b": 0.4}
    drawn = [
        aggregate(
            {t: Score(generator.normal(s.mean, s.stderr), s.stderr, s.n) for t, s in SCORES.items()},
            WEIGHTS, kind, best,
        ).value
        for _ in range(2000)
    ]  # fmt: skip
    # the sd of n = 2000 draws has a relative error of 1 / sqrt(2 n) = 1.6 %; 5 sigma
    assert np.std(drawn, ddof=1) == pytest.approx(aggregate(SCORES, WEIGHTS, kind, best).stderr, rel=0.08)


def test_an_unknown_error_of_a_task_makes_that_of_the_fitness_unknown():
    scores = {**SCORES, "a": Score(0.8, None, 1)}
    assert aggregate(scores, WEIGHTS, "mean").stderr is None
    assert aggregate(scores, WEIGHTS, "min").stderr == 0.04


@pytest.mark.parametrize(
    ("scores", "weights", "best", "message"),
    [
        ({}, {}, None, "no task has a score"),
        (SCORES, {"a": 1.0}, {"a": 1.0, "b": 1.0}, "task `b` has no weight"),
        (SCORES, WEIGHTS, {"a": 1.0}, "task `b` has no best source score"),
        (SCORES, WEIGHTS, None, "task `a` has no best source score"),
    ],
)
def test_an_incomplete_aggregate_is_refused(scores, weights, best, message):
    with pytest.raises(FitnessError, match=message):
        aggregate(scores, weights, "normalized", best)


# --- bootstrap


def test_the_paired_interval_is_that_of_scipy():
    a, b = two_recipes()
    ours = paired_bootstrap({"t": by_item(a)}, {"t": by_item(b)}, ONE, "mean", seed=1, resamples=20_000)
    scipys = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=20_000, rng=np.random.default_rng(2),
    )  # fmt: skip
    assert ours.difference == pytest.approx(float(np.mean(a - b)))
    # sd of a normal's 2.5 % quantile over R draws: sqrt(p (1 - p) / R) / pdf(1.96) = 0.0189 sd at
    # R = 20,000; two such, 5 sigma
    tolerance = 5 * math.sqrt(2) * 0.0189 * scipys.standard_error
    assert ours.low == pytest.approx(scipys.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(scipys.confidence_interval.high, abs=tolerance)


def test_the_interval_of_one_score_is_that_of_scipy():
    a, _ = two_recipes()
    ours = interval({"t": by_item(a)}, ONE, "mean", seed=1, resamples=20_000)
    scipys = scipy.stats.bootstrap(
        (a,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    )
    tolerance = 5 * math.sqrt(2) * 0.0189 * scipys.standard_error
    assert ours.value == pytest.approx(a.mean())
    assert ours.low == pytest.approx(scipys.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(scipys.confidence_interval.high, abs=tolerance)


def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says():
    n, simulations, level = 60, 300, 0.9
    inside = 0
    for seed in range(simulations):
        a, b = two_recipes(seed, n)
        found = paired_bootstrap(
            {"t": by_item(a)}, {"t": by_item(b)}, ONE, "mean", seed, resamples=400, level=level
        )
        inside += found.low <= 0.1 <= found.high
    # For normal data the percentile interval is mean -+ z s_n / sqrt(n), with s_n that of divisor n.
    z = scipy.stats.norm.ppf((1 + level) / 2) * math.sqrt((n - 1) / n)
    expected = 1 - 2 * scipy.stats.t.sf(z, n - 1)
    assert inside / simulations == pytest.approx(
        expected, abs=4 * math.sqrt(level * (1 - level) / simulations)
    )


@pytest.mark.parametrize("seed", range(1, 7))
def test_the_p_value_is_that_of_a_paired_t_test(seed):
    a, b = two_recipes(seed, n=200, gain=0.07)
    ours = paired_bootstrap({"t": by_item(a)}, {"t": by_item(b)}, ONE, "mean", seed=0)
    p = scipy.stats.ttest_rel(a, b).pvalue
    # 4 sigma of a proportion p / 2 of 10,000, doubled as the p-value is, and 0.01 for t against normal
    assert ours.p_value == pytest.approx(p, abs=0.01 + 8 * math.sqrt(p / 2 * (1 - p / 2) / 10_000))


@pytest.mark.parametrize("kind", ["mean", "min", "normalized"])
def test_a_recipe_does_not_differ_from_itself(kind):
    a, b = two_recipes()
    values = {"x": by_item(a), "y": by_item(b)}
    found = paired_bootstrap(
        values, values, {"x": 1, "y": 2}, kind, 0, best_source={"x": 0.4, "y": 0.2}, resamples=200
    )
    assert found == (0, 0, 0, 1)
    assert not found.significant


def test_exchanging_the_recipes_turns_the_interval_round():
    a, b = ({"t": by_item(values)} for values in two_recipes())
    forth, back = (paired_bootstrap(*pair, ONE, "mean", 5, resamples=1000) for pair in ((a, b), (b, a)))
    assert forth == pytest.approx((-back.difference, -back.high, -back.low, back.p_value))


def test_pairing_narrows_the_interval_of_correlated_recipes():
    a, b = two_recipes(gain=0.4)
    paired = paired_bootstrap({"t": by_item(a)}, {"t": by_item(b)}, ONE, "mean", 0, resamples=2000)
    alone = interval({"t": by_item(a)}, ONE, "mean", 0, resamples=2000)
    assert paired.significant
    # sds: sqrt(2 * 0.25) = 0.71 of the difference, sqrt(2 * 1.25) = 1.58 unpaired; alone sqrt(1.25) = 1.12
    assert paired.high - paired.low < 0.8 * (alone.high - alone.low)


def test_min_takes_the_smaller_task_in_every_resample():
    low, high = by_item([0.0, 0.2, 0.1, 0.1] * 5), by_item([0.9, 1.0] * 10)
    both = interval({"low": low, "high": high}, {"low": 1, "high": 1}, "min", 0, resamples=500)
    assert 0 <= both.low < both.value == pytest.approx(0.1)
    assert both.high <= 0.2


def test_the_bootstrap_of_several_tasks_has_the_error_of_the_aggregate():
    a, b = two_recipes(n=400)
    values = {"x": by_item(a), "y": by_item(b)}
    scores = score_tasks([ItemScore(t, i, v, "", 1) for t, items in values.items() for i, v in items.items()])
    best, weights = {"x": 0.4, "y": -0.2}, {"x": 1.0, "y": 2.0}
    found = interval(values, weights, "normalized", 0, best_source=best, level=0.6827)
    fitness = aggregate(scores, weights, "normalized", best)
    assert found.value == pytest.approx(fitness.value)
    # half of a 68.27 % interval is one sd; quantiles over 10,000 draws are good to about 2 %, 4 sigma
    assert (found.high - found.low) / 2 == pytest.approx(fitness.stderr, rel=0.08)


def test_the_interval_does_not_depend_on_order_or_chunks(monkeypatch):
    a, b = two_recipes(n=40)
    values = [{"x": by_item(v), "y": by_item(v * v)} for v in (a, b)]
    turned = [{t: dict(reversed(v[t].items())) for t in reversed(v)} for v in values]
    weights = {"x": 1, "y": 2}
    first = paired_bootstrap(*values, weights, "mean", 3, resamples=300)
    assert paired_bootstrap(*turned, weights, "mean", 3, resamples=300) == first
    assert paired_bootstrap(*values, weights, "mean", 4, resamples=300) != first
    monkeypatch.setattr(module, "_CHUNK", 7 * 40)
    assert paired_bootstrap(*values, weights, "mean", 3, resamples=300) == first


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"t": by_item([1, 2])}, {"t": by_item([1, 2, 3])},
         r"task `t`: item `i0002` .* one recipe only \(1 such"),
        ({"t": by_item([1, 2])}, {"u": by_item([1, 2])}, "task `t` was scored for one recipe only"),
        ({"t": by_item([1])}, {"t": by_item([0])}, "task `t` has 1 items, but an interval needs at least 2"),
    ],
)  # fmt: skip
def test_recipes_scored_on_other_or_too_few_items_are_not_compared(a, b, message):
    with pytest.raises(FitnessError, match=message):
        paired_bootstrap(a, b, {"t": 1, "u": 1}, "mean", 0, resamples=10)
