"""The fixed recipes: which there are, and what they merge."""

from __future__ import annotations

from math import comb

import pytest

from evomerge.recipe import Cell
from evomerge.study.fixed import MOST_SOURCES, fixed_recipes
from tests.family import family


def named(n: int, scales=(0.5,), subset_scales=(0.7,)):
    models = [f"m{i}" for i in range(n)]
    found = fixed_recipes(family(2, models), scales=scales, subset_scales=subset_scales)
    return {fixed.label: fixed for fixed in found}


def test_three_models_give_base_sources_and_the_merges_one_would_try():
    assert list(named(3, scales=(0.3, 1.0))) == [
        "base",
        "m0",
        "m1",
        "m2",
        "uniform average",
        "task arithmetic 0.3",
        "task arithmetic 1",
        "ties 0.2",
        "m0+m1 0.7",
        "m0+m2 0.7",
        "m1+m2 0.7",
    ]


@pytest.mark.parametrize("n", [2, 4, 5, MOST_SOURCES])
def test_every_pair_and_every_leave_one_out_is_there(n: int):
    sets = [set(label.removesuffix(" 0.7").split("+")) for label in named(n) if "+" in label]
    assert sum(len(s) == 2 for s in sets) == comb(n, 2)
    if n > 2:  # leaving one of two out is a source alone
        assert sum(len(s) == n - 1 for s in sets) == n


def test_with_many_sources_pairs_are_left_out_and_sources_are_not():
    labels = named(MOST_SOURCES + 1)
    assert not any("+" in label for label in labels)
    assert sum(fixed.kind == "source" for fixed in labels.values()) == MOST_SOURCES + 1


def test_one_model_leaves_only_base_and_source():
    assert [fixed.kind for fixed in named(1).values()] == ["base", "source"]


def test_equal_recipes_appear_once():
    """With two models the only pair is all of them."""
    labels = named(2, scales=(0.5,), subset_scales=(0.5,))
    assert "task arithmetic 0.5" in labels
    assert "m0+m1 0.5" not in labels
    assert len({fixed.recipe.digest for fixed in labels.values()}) == len(labels)


def test_a_source_alone_takes_its_whole_task_vector_and_no_other():
    setting = named(3)["m1"].recipe.setting(Cell(0, "mlp"))
    assert dict(setting.models) == {"m1": {"weight": 1.0}}


def test_ties_has_the_papers_defaults():
    """Yadav 2023: the top 20 % of every task vector, lambda 1."""
    setting = named(3)["ties 0.2"].recipe.setting(Cell(1, "attention"))
    assert setting.method == "ties"
    assert all(values["density"] == 0.2 for values in setting.models.values())
    assert setting.parameters.get("lambda", 1.0) == 1.0
