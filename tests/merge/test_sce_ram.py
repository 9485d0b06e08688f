"""SCE and RAM against their definitions in numpy, on task vectors with zeros and agreement."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.merge.methods._method import TensorInputs
from evomerge.merge.methods.sce import selected, variance
from evomerge.recipe import Setting

SHAPE = (40, 30)


def task_vectors(count: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Multiples of 1/16, so that sums are exact; a third of the entries agree in all, a third are zero."""
    generator = torch.Generator().manual_seed(count)
    same = torch.randint(-16, 17, SHAPE, generator=generator)
    kind = torch.randint(0, 3, SHAPE, generator=generator)
    own = [torch.randint(-160, 161, SHAPE, generator=generator) for _ in range(count)]
    return [torch.where(kind == 0, same, torch.where(kind == 1, x, 0 * x)).double() / 16 * scale for x in own]


def sce(taus: np.ndarray, share: float) -> np.ndarray:
    """From the text: select, calculate, erase. `taus` (N, n); returns the merged task vector (n,)."""
    if share < 1:
        spread = taus.var(axis=0)
        k = int(share * np.count_nonzero(spread))
        keep = np.zeros(taus.shape[1])
        keep[np.argsort(-spread, kind="stable")[:k]] = 1
        taus = taus * keep
    weight = (taus**2).mean(axis=1)
    weight = weight / weight.sum() if weight.sum() >= 1e-6 else np.full(len(taus), 1 / len(taus))
    sign = np.where(taus.sum(axis=0) >= 0, 1, -1)
    agree = weight[:, None] * (np.sign(taus) == sign)
    return (agree * taus).sum(axis=0) / np.maximum(agree.sum(axis=0), 1e-6)


def ram(taus: np.ndarray, epsilon: float, r: float = 0.0, alpha: float = 0.0) -> np.ndarray:
    """From the text: unique entries times their factor, shared ones averaged."""
    changed = np.abs(taus) > epsilon
    count = changed.sum(axis=0)
    alone, shared = (changed & (count == 1)).sum(axis=1), (changed & (count > 1)).sum(axis=1)
    factor = 1 + r * np.clip(shared / np.maximum(alone, epsilon or 1), 0, alpha)
    mean = (taus * changed).sum(axis=0) / np.maximum(count, 1)
    return np.where(count == 1, (factor[:, None] * taus * changed).sum(axis=0), mean)


def merged(merge, method: str, taus: list[torch.Tensor], **shared: float) -> np.ndarray:
    setting = Setting(method, shared, {f"m{i}": {} for i in range(len(taus))})
    return merge(setting, torch.zeros(SHAPE, dtype=torch.float64), list(taus)).reshape(-1).numpy()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0**-14])
def test_sce_is_its_definition(count, share, scale, merge):
    """With the small scale the mean squares are below 1e-6 and all weights equal."""
    taus = task_vectors(count, scale)
    expected = sce(np.stack([tau.reshape(-1).numpy() for tau in taus]), share)
    np.testing.assert_allclose(merged(merge, "sce", taus, select_topk=share), expected, rtol=0, atol=1e-12)


def test_positions_where_all_models_agree_have_no_variance():
    """A sum of three equal numbers is rounded, so a mean by summing would leave some."""
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert variance([x, x, x], x, torch.float32).count_nonzero() == 0


def test_a_missing_task_vector_counts_in_the_variance():
    x = torch.tensor([2.0, -4.0])
    assert variance([x, None], x, torch.float32).tolist() == [1.0, 4.0]


def test_of_equal_variances_the_first_are_selected():
    setting = Setting("sce", {"select_topk": 0.5}, {"a": {}, "b": {}})
    inputs = TensorInputs(torch.zeros(8), [torch.ones(8), -torch.ones(8)], setting, torch.float32, (8,))
    assert selected(inputs, 0.5).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5, 3.0])
def test_ram_is_its_definition(count, epsilon, merge):
    taus = task_vectors(count)
    expected = ram(np.stack([tau.reshape(-1).numpy() for tau in taus]), epsilon)
    np.testing.assert_allclose(merged(merge, "ram", taus, epsilon=epsilon), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 100.0), (-0.7, 0.9)])
@pytest.mark.parametrize("epsilon", [1e-5, 3.0])
def test_ramplus_is_its_definition(r, alpha, epsilon, merge):
    """The factor is float32 in mergekit and here."""
    taus = [tau * mask for tau, mask in zip(task_vectors(3), sparse_masks(3), strict=True)]
    expected = ram(np.stack([tau.reshape(-1).numpy() for tau in taus]), epsilon, r, alpha)
    result = merged(merge, "ramplus_tl", taus, epsilon=epsilon, r=r, alpha=alpha)
    np.testing.assert_allclose(result, expected, rtol=3e-7, atol=1e-12)
    assert not np.allclose(result, merged(merge, "ram", taus, epsilon=epsilon), rtol=1e-3)


def sparse_masks(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.rand(SHAPE, generator=generator) < 0.4 + 0.1 * i for i in range(count)]


def test_a_model_that_changes_nothing_has_no_effect_on_the_others_factors(merge):
    taus = [tau * mask for tau, mask in zip(task_vectors(2), sparse_masks(2), strict=True)]
    shared = {"epsilon": 0.0, "r": 0.5, "alpha": 1e9}
    alone = merged(merge, "ramplus_tl", taus, **shared)
    assert np.isfinite(alone).all()
    for nothing in (None, torch.zeros(SHAPE, dtype=torch.float64)):
        assert (merged(merge, "ramplus_tl", [*taus, nothing], **shared) == alone).all()


@pytest.mark.parametrize("method", ["sce", "ram", "ramplus_tl"])
def test_task_vectors_are_not_changed(method, merge):
    taus = task_vectors(3)
    copies = [tau.clone() for tau in taus]
    merged(merge, method, taus)
    assert all(torch.equal(tau, copy) for tau, copy in zip(taus, copies, strict=True))
