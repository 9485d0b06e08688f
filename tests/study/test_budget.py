"""Budgets: how they are written, and how much of one is used."""

from __future__ import annotations

from datetime import datetime

import pytest

from evomerge.errors import ConfigError
from evomerge.study.budget import Budget, Spent, end_of, seconds_of, used

NOW = datetime(2026, 3, 1, 22, 15, 30)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h", 28_800),
        ("90m", 5_400),
        ("90min", 5_400),
        ("45s", 45),
        ("1h30m", 5_400),
        ("1h 30m 5s", 5_405),
        ("1.5h", 5_400),
        (" 8 H ", 28_800),
        ("until 22:16", 30),
        ("until 07:30", 9 * 3600 + 14 * 60 + 30),
        ("UNTIL  7:30", 9 * 3600 + 14 * 60 + 30),
        ("until 22:15", 24 * 3600 - 30),  # today's has passed
    ],
)
def test_a_time_is_a_duration_or_a_time_of_day(text: str, seconds: float):
    assert seconds_of(text, NOW) == seconds


@pytest.mark.parametrize(
    "text", ["", "8", "h", "0h", "0h0m", "-1h", "8h30", "30m1h", "1 2h", "8 hours", "until 24:00", "until 7"]
)
def test_any_other_time_is_refused_with_the_forms_that_are_not(text: str):
    with pytest.raises(ConfigError, match=r"is not understood; write a duration such as `8h`.*`until 07:30`"):
        seconds_of(text, NOW)


def test_a_time_of_day_has_an_end_that_stays_and_a_duration_has_none():
    assert end_of("until 07:30", NOW) == datetime(2026, 3, 2, 7, 30)
    assert end_of("8h", NOW) is None


def test_the_limit_that_is_nearest_counts():
    budget = Budget(trials=110, seconds=1000, items=10_000)
    start = Spent(10, 100.0, 0)
    assert used(budget, start, Spent(60, 100.0, 0), 0.0) == 0.5
    assert used(budget, start, Spent(60, 775.0, 0), 0.0) == 0.75
    assert used(budget, start, Spent(60, 775.0, 9_000), 0.0) == 0.9


def test_seconds_for_the_final_part_are_kept_back():
    budget, start = Budget(seconds=1000), Spent(5, 200.0, 0)
    assert used(budget, start, Spent(6, 500.0, 10), reserve=200.0) == 0.5
    assert used(budget, start, Spent(6, 800.0, 10), reserve=200.0) == 1.0


@pytest.mark.parametrize("budget", [Budget(trials=10), Budget(seconds=100.0), Budget(items=50)])
def test_a_limit_that_the_fixed_recipes_reached_is_used_up(budget: Budget):
    spent = Spent(10, 100.0, 50)
    assert used(budget, spent, spent, 0.0) == 1.0


def test_without_a_limit_nothing_is_used():
    assert used(Budget(), Spent(), Spent(10**6, 1e9, 10**9), 0.0) == 0.0
