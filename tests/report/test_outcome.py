"""The outcome in words: the first line says what was gained, and whether it is significant."""

from __future__ import annotations

import json

import pytest

from evomerge.evaluate.score import Estimate, Interval, Score
from evomerge.recipe import Recipe
from evomerge.report.outcome import as_json, as_markdown, headline, markdown_table, table
from evomerge.study.final import Entry, Result

RECIPE = Recipe("base", ("math",), {})
FAR = Interval(0.05, 0.02, 0.08, 0.001)
NEAR = Interval(0.01, -0.02, 0.04, 0.4)


def entry(label, kind, value, lead=None, **fields):
    estimate = Estimate(value, value - 0.03, value + 0.03)
    return Entry(
        label, kind, RECIPE, held_out=estimate, tasks={"t": Score(value, 0.01, 40)}, lead=lead, **fields
    )


def result(winner, *others):
    return Result(winner, (winner, *others), {"calibration": 40, "selection": 30, "held_out": 120})


FOUND = entry("trial 12", "search", 0.7, calibration=0.81, selection=Estimate(0.72, 0.69, 0.75))


def test_a_significant_gain_over_both_is_said_first():
    text = headline(
        result(
            FOUND, entry("ties 0.2", "fixed", 0.66, FAR), entry("math", "source", 0.65, FAR, calibration=0.6)
        )
    )
    assert text == (
        "Significant gain over the best source and the best fixed recipe: `trial 12` scores 0.700 on 120 "
        "held-out items; difference to the best source (`math`, 0.650) +0.050 [+0.020, +0.080], to the best "
        "fixed recipe (`ties 0.2`, 0.660) +0.050 [+0.020, +0.080]."
    )


@pytest.mark.parametrize(
    ("over_source", "over_fixed", "start"),
    [
        (NEAR, NEAR, "Not significant over the best source and the best fixed recipe: `trial 12` "),
        (FAR, NEAR, "Not significant over the best fixed recipe: `trial 12` "),
        (NEAR, FAR, "Not significant over the best source: `trial 12` "),
    ],
)
def test_a_gain_that_may_be_chance_is_said_first(over_source, over_fixed, start):
    others = (entry("math", "source", 0.69, over_source), entry("ties 0.2", "fixed", 0.68, over_fixed))
    assert headline(result(FOUND, *others)).startswith(start)


@pytest.mark.parametrize(
    ("winner", "start"),
    [
        (
            entry("ties 0.2", "fixed", 0.7),
            "No gain from the search, a fixed recipe won on the selection items: `ties 0.2` scores 0.700",
        ),
        (
            entry("code", "source", 0.7),
            "No gain from merging, a source alone won on the selection items: `code` scores 0.700",
        ),
        (
            entry("base", "base", 0.7),
            "No gain from merging, the base model won on the selection items: `base` scores 0.700",
        ),
    ],
)
def test_no_gain_is_said_first_however_far_the_winner_leads(winner, start):
    others = (entry("math", "source", 0.6, FAR), entry("task arithmetic 1", "fixed", 0.6, FAR))
    assert headline(result(winner, *others)).startswith(start)


def test_a_winner_is_compared_with_the_others_of_its_kind():
    text = headline(
        result(
            entry("ties 0.2", "fixed", 0.7), entry("m", "source", 0.6, FAR), entry("t", "fixed", 0.6, NEAR)
        )
    )
    assert "to the best source (`m`, 0.600)" in text
    assert "to the best other fixed recipe (`t`, 0.600)" in text


def test_without_rivals_nothing_is_claimed():
    text = headline(result(FOUND, entry("base", "base", 0.1, FAR)))
    assert text == "Not significant over the best source: `trial 12` scores 0.700 on 120 held-out items."


def test_the_best_of_each_kind_on_held_out_items_is_the_rival():
    rivals = result(
        FOUND,
        entry("good", "source", 0.6, FAR),
        entry("bad", "source", 0.5, FAR),
        entry("average", "fixed", 0.4, FAR),
    ).rivals
    assert [e.label for e, _ in rivals] == ["good", "average"]


def test_the_table_has_a_row_for_every_entry_and_a_column_for_every_task():
    header, rows = table(result(FOUND, entry("math", "source", 0.65, FAR)))
    assert header == ["recipe", "calibration", "selection", "held-out [95 %]", "t", "winner's lead [95 %]"]
    assert rows == [
        ["trial 12 (winner)", "0.810", "0.720", "0.700 [0.670, 0.730]", "0.700", ""],
        ["math", "", "", "0.650 [0.620, 0.680]", "0.650", "+0.050 [+0.020, +0.080]"],
    ]


def test_the_table_is_markdown():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_page_opens_with_the_headline_and_ends_with_the_facts():
    found = result(FOUND, entry("math", "source", 0.65, FAR))
    lines = as_markdown(found, {"trials": 40, "engine": "fake"}).splitlines()
    assert lines[0] == headline(found)
    assert lines[-2:] == ["- trials: 40", "- engine: fake"]
    assert any(line.startswith("Items: 40 calibration, 30 selection, 120 held-out.") for line in lines)


def test_the_outcome_is_plain_data():
    found = result(FOUND, entry("math", "source", 0.65, FAR), entry("ties 0.2", "fixed", 0.66, NEAR))
    data = json.loads(json.dumps(as_json(found)))
    assert data["headline"] == headline(found)
    assert data["winner"] == "trial 12"
    assert data["significant"] == {"source": True, "fixed": False}
    assert data["entries"][1]["winners_lead"] == FAR._asdict()
    assert data["entries"][0]["winners_lead"] is None
