"""DELLA's ranks, probabilities and masks against their definitions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge.methods import SPECS
from evomerge.merge.methods.della import keep_probabilities, row_length, row_ranks
from evomerge.recipe import Setting


def thinned(delta: torch.Tensor, merge, seed: int = 0, method: str = "della_linear", **values: float):
    """What is left of `delta`, not rescaled."""
    setting = Setting(method, {"rescale": False}, {"m": {"weight": 1.0, **values}})
    return merge(setting, torch.zeros_like(delta), [delta], seeds=(seed,))


def probabilities(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    shape = tuple(delta.shape)
    ranks = row_ranks(delta.reshape(-1), shape)
    return keep_probabilities(density, epsilon, row_length(shape))[ranks.long()].reshape(shape)


@pytest.mark.goldens("della_keep_probability")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keep_probabilities_are_the_definitions(case, dtype):
    """Probabilities are float64 whatever the dtype of the task vector."""
    tau = torch.tensor(case["inputs"]["tau"], dtype=dtype)
    expected = torch.tensor(case["expected"], dtype=torch.float64)
    torch.testing.assert_close(probabilities(tau, **case["params"]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 5), (40,), (1, 6), (6, 1), (2, 3, 4)], ids=str)
def test_ranks_are_those_of_a_sort_along_dimension_one(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    size = np.abs(delta.numpy())
    rows = size.reshape(1, -1) if len(shape) == 1 else size
    expected = rows.argsort(axis=1).argsort(axis=1).reshape(-1)
    assert row_ranks(delta.reshape(-1), shape).tolist() == expected.tolist()


def test_of_equal_magnitudes_the_later_has_the_higher_rank():
    assert row_ranks(torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0]), (5,)).tolist() == [2, 3, 0, 4, 1]


def test_ranks_do_not_depend_on_how_many_rows_are_sorted_at_once(monkeypatch):
    delta = torch.randn(60 * 30, generator=torch.Generator().manual_seed(1))
    whole = row_ranks(delta, (60, 30))
    monkeypatch.setattr("evomerge.merge.methods.della.SORTED", 100)
    assert torch.equal(row_ranks(delta, (60, 30)), whole)


@pytest.mark.parametrize(("columns", "size"), [(1 << 15, 2), ((1 << 15) + 1, 4)])
def test_ranks_take_two_bytes_and_in_long_rows_four(columns, size):
    delta = torch.arange(float(columns))
    ranks = row_ranks(delta, (1, columns))
    assert ranks.nbytes == size * columns
    assert ranks[-1] == columns - 1


def test_a_row_of_one_entry_is_kept_with_the_density():
    assert probabilities(torch.ones(3, 1), 0.4, 0.3).tolist() == [[0.4]] * 3


def test_entries_are_kept_as_often_as_their_rank_says(merge):
    """Over seeds the share of an entry is binomial; the largest of 400 deviations is below 5 sigma."""
    delta = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    seeds = 2000
    kept = sum((thinned(delta, merge, s, density=0.5, epsilon=0.4) != 0).double() for s in range(seeds))
    p = probabilities(delta, 0.5, 0.4)
    assert (((kept / seeds - p).abs()) < 5 * (p * (1 - p) / seeds).sqrt()).all()


def test_without_a_spread_the_entries_are_those_of_dare(merge):
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    dare = Setting("dare_linear", {"rescale": False}, {"m": {"weight": 1.0, "density": 0.4}})
    expected = merge(dare, torch.zeros_like(delta), [delta], seeds=(5,))
    assert torch.equal(thinned(delta, merge, 5, density=0.4, epsilon=0.0), expected)


def test_kept_entries_are_rescaled_to_the_same_l1_norm(merge):
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    setting = Setting("della_linear", {}, {"m": {"weight": 1.0, "density": 0.4, "epsilon": 0.2}})
    merged = merge(setting, torch.zeros_like(delta), [delta], seeds=(5,))
    torch.testing.assert_close(merged.abs().sum(), delta.abs().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_chunk_does_not_change_a_mask_of_rows(chunk, merge):
    delta, other = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(5))
    values = {"weight": 1.0, "density": 0.4, "epsilon": 0.2}
    setting = Setting("della", {}, {"a": values, "b": values})
    base = torch.zeros_like(delta)
    whole = merge(setting, base, [delta, other], seeds=(1, 2))
    assert torch.equal(merge(setting, base, [delta, other], seeds=(1, 2), chunk=chunk), whole)


@pytest.mark.parametrize("values", [{"density": 0.9}, {"density": 0.1}, {"density": 0.85, "epsilon": 0.15}])
def test_probabilities_outside_0_and_1_are_refused(values):
    """mergekit 0.1.5 refuses the same three, in the middle of a merge."""
    setting = Setting("della", {}, {"math": {"weight": 1.0, **values}})
    with pytest.raises(
        RecipeError, match=r"cell, model `math`: epsilon is 0\.15.*smaller of density and 1 -"
    ):
        SPECS["della"].complete(setting, "cell")


def test_rounding_for_the_canonical_form_keeps_a_setting_valid():
    spec, rng = SPECS["della_linear"], random.Random(0)
    for _ in range(500):
        density = rng.uniform(0.0, 1.0)
        values = {"weight": 1.0, "density": density, "epsilon": min(density, 1 - density) - 2e-6}
        if values["epsilon"] > 0:
            canonical = spec.canonical(Setting("della_linear", {}, {"m": values}))
            SPECS[canonical.method].complete(canonical, "cell")
