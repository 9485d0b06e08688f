"""Methods that weigh by statistics of the models, and OPCM: goldens, numpy, and what papers leave open."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge.methods import SPECS
from evomerge.recipe import Setting
from tests.merge.conftest import Given

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def tensors(rows: list, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=dtype) for row in rows]


def weighted(*weights: float) -> dict[str, dict[str, float]]:
    return {f"m{i}": {"weight": weight} for i, weight in enumerate(weights)}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(rows: int, k: int, seed: int) -> torch.Tensor:
    x = drawn(rows, k, seed=seed)
    return x.mT @ x / rows


@pytest.mark.goldens("fisher")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fisher_agrees_with_its_goldens(case, dtype, merge):
    """They have an absolute floor; one that small, relative, counts only where all information is 0."""
    models = tensors(case["inputs"]["models"], dtype)
    setting = Setting("fisher", {}, weighted(*case["params"]["weights"]))
    statistics = Given(tensors(case["inputs"]["fisher"], dtype))
    base = torch.full_like(models[0], 0.25)
    merged = merge(setting, base, [model - base for model in models], statistics=statistics)
    expected = torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.goldens("regmean")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_regmean_agrees_with_its_goldens(case, dtype, merge):
    models = tensors(case["inputs"]["models"], dtype)
    parameters = {"off_diagonal": case["params"]["reduce_non_diagonal"], "ridge": 0.0}
    statistics = Given(tensors(case["inputs"]["gram"], dtype))
    base = torch.full_like(models[0], 0.25)
    setting = Setting("regmean", parameters, weighted(1.0, 1.0))
    merged = merge(setting, base, [model - base for model in models], statistics=statistics)
    expected = torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.goldens("ota")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ota_agrees_with_its_goldens(case, dtype, merge):
    base, *models = tensors([case["inputs"]["base"], *case["inputs"]["models"]], dtype)
    params = case["params"]
    each = {"threshold": params["precond_threshold"] or 0.0}
    shared = {"power": params["power"], "eps": params["epsilon"]}
    statistics = Given(tensors(case["inputs"]["exp_avg_sq"], dtype))
    setting = Setting("ota", shared, {"m0": each, "m1": each})
    merged = merge(setting, base, [model - base for model in models], statistics=statistics)
    expected = torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.goldens("opcm")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_opcm_agrees_with_the_authors_code_for_a_model_of_one_tensor(case, dtype, merge):
    base, *models = tensors([case["inputs"]["base"], *case["inputs"]["models"]], dtype)
    setting = Setting("opcm_per_tensor", case["params"], {f"m{i}": {} for i in range(len(models))})
    merged = merge(setting, base, [model - base for model in models])
    expected = torch.tensor(case["expected"], dtype=dtype)
    # float32: the goldens' SVDs are of sums with close singular values, so errors grow by their gaps
    tolerance = TOLERANCE[dtype] * (1 if dtype == torch.float64 else 5)
    torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)


def test_the_floor_of_fisher_scales_with_the_information(merge):
    """Per-token information of a large model is around 1e-10: an absolute floor of 1e-6 would hide it."""
    base, x, y = drawn(3, 40)
    rows = [drawn(40, seed=seed).square() for seed in (5, 6)]
    setting = Setting("fisher", {"floor": 1e-3}, weighted(0.3, 0.7))
    one, other = (
        merge(setting, base, [x, y], statistics=Given([row * scale for row in rows])) for scale in (1, 1e-10)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_normalized_fisher_does_not_see_the_scale_of_one_model(merge):
    base, x, y = drawn(3, 40)
    first, second = (drawn(40, seed=seed).square() for seed in (5, 6))
    setting = Setting("fisher", {"normalize": True, "floor": 1e-3}, weighted(0.3, 0.7))
    one, other = (
        merge(setting, base, [x, y], statistics=Given([first * scale, second])) for scale in (1, 1e3)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_normalized_fisher_is_the_authors_coefficient(merge):
    """Coefficient w / |F|, |F| over the whole model (mmatena/model_merging), in numpy."""
    base, x, y = (row.numpy() for row in drawn(3, 40))
    first, second = (drawn(40, seed=seed).square().numpy() for seed in (5, 6))
    a, b = 0.3 * first / np.linalg.norm(first), 0.7 * second / np.linalg.norm(second)
    expected = (a * (base + x) + b * (base + y)) / (a + b)
    setting = Setting("fisher", {"normalize": True, "floor": 1e-30}, weighted(0.3, 0.7))
    given = Given([torch.tensor(first), torch.tensor(second)])
    merged = merge(setting, torch.tensor(base), [torch.tensor(x), torch.tensor(y)], statistics=given)
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_tensor_without_statistics_is_the_weighted_average(method, merge):
    base, x, y = drawn(3, 6, 5)
    setting = Setting(method, {}, weighted(1.0, 3.0))
    merged = merge(setting, base, [x, y], statistics=Given([gram(9, 5, seed=1), None]))
    torch.testing.assert_close(merged, base + 0.25 * x + 0.75 * y, rtol=1e-12, atol=1e-12)


def test_ota_of_a_tensor_without_statistics_is_the_plain_average(merge):
    base, x, y = drawn(3, 6, 5)
    merged = merge(
        Setting("ota", {}, {"m0": {"density": 0.1}, "m1": {}}), base, [x, y], statistics=Given([None, None])
    )
    torch.testing.assert_close(merged, base + 0.5 * x + 0.5 * y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_weights_that_are_all_zero_are_refused(method, merge):
    base, x, y = drawn(3, 6, 5)
    with pytest.raises(RecipeError, match=f"weights of {method} are all 0.*raise one"):
        merge(Setting(method, {}, weighted(0.0, 0.0)), base, [x, y])


def test_regmean_minimises_the_distance_of_the_outputs(merge):
    """Jin 2022, equation 1: the merged W minimises sum_i |X_i W^T - X_i W_i^T|^2, here by least squares."""
    inputs = [drawn(30, 5, seed=seed) for seed in (1, 2)]
    base, x, y = drawn(3, 4, 5)
    stacked = torch.cat(inputs)
    outputs = torch.cat([rows @ (base + delta).mT for rows, delta in zip(inputs, (x, y), strict=True)])
    expected = torch.linalg.lstsq(stacked, outputs).solution.mT
    setting = Setting("regmean", {"off_diagonal": 1.0, "ridge": 0.0}, weighted(1.0, 1.0))
    grams = Given([rows.mT @ rows / len(rows) for rows in inputs])
    torch.testing.assert_close(merge(setting, base, [x, y], statistics=grams), expected, rtol=0, atol=1e-11)


def test_regmean_without_a_ridge_refuses_inputs_that_leave_directions_open(merge):
    base, x, y = drawn(3, 4, 5)
    setting = Setting("regmean", {"off_diagonal": 1.0, "ridge": 0.0}, weighted(1.0, 1.0))
    grams = Given([torch.zeros(5, 5, dtype=torch.float64)] * 2)
    with pytest.raises(RecipeError, match=r"Gram matrices is singular.*raise `ridge`"):
        merge(setting, base, [x, y], statistics=grams)


def test_regmean_averages_directions_that_no_input_has(merge):
    """With `ridge`: the inputs have the first two of five columns only."""
    inputs = [drawn(30, 5, seed=seed) * torch.tensor([1.0, 1, 0, 0, 0]) for seed in (1, 2)]
    base, x, y = drawn(3, 4, 5)
    setting = Setting("regmean", {"off_diagonal": 1.0}, weighted(1.0, 3.0))
    merged = merge(setting, base, [x, y], statistics=Given([rows.mT @ rows / 30 for rows in inputs]))
    average = base + 0.25 * x + 0.75 * y
    torch.testing.assert_close(merged[:, 2:], average[:, 2:], rtol=0, atol=1e-9)
    assert (merged - average)[:, :2].abs().min() > 1e-3


def test_ota_keeps_the_most_salient_entries_of_every_model(merge):
    base, x, y = drawn(3, 50)
    moments = [drawn(50, seed=seed).square() for seed in (5, 6)]
    expected, total = np.zeros(50), np.zeros(50)
    for moment, delta, kept in zip(moments, (x, y), (10, 25), strict=True):
        order = np.argsort(-(moment * delta**2).numpy())[:kept]
        mask = np.isin(np.arange(50), order)
        expected += mask * (moment.sqrt() * delta).numpy()
        total += mask * moment.sqrt().numpy()
    expected = base.numpy() + np.divide(expected, total, out=np.zeros(50), where=total > 0)
    setting = Setting("ota", {}, {"m0": {"density": 0.2}, "m1": {"density": 0.5}})
    merged = merge(setting, base, [x, y], statistics=Given(moments))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


def opcm(deltas: list[np.ndarray], alpha: float) -> np.ndarray:
    """The authors' steps, each rescaled, for a model of one matrix; entries past the rank are not masked."""
    merged, before, lengths = deltas[0], 1.0, [np.linalg.norm(deltas[0])]
    for delta in deltas[1:]:
        lengths.append(np.linalg.norm(delta))
        u, s, vh = np.linalg.svd(merged, full_matrices=True)
        rank = int((s > 1e-10 * s[0]).sum())
        place = min(int((np.cumsum(s) / s.sum() <= alpha).sum()), rank - 1)
        z = u.T @ delta @ vh.T
        z[range(rank), range(rank)] = 0.0
        z[:place, :place] = 0.0
        merged = before * merged + u @ z @ vh
        before = np.linalg.norm(merged) / np.mean(lengths)
        merged = merged / before
    return merged


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_opcm_rescaled_once_is_opcm_rescaled_at_every_step(shape, alpha, merge):
    deltas = [drawn(*shape, seed=seed) for seed in range(4)]
    deltas[0] = deltas[0][:, :2] @ drawn(2, shape[1], seed=9)  # as that of an adapter
    base = drawn(*shape, seed=8)
    setting = Setting("opcm_per_tensor", {"alpha": alpha}, {f"m{i}": {} for i in range(4)})
    merged = merge(setting, base, deltas) - base
    np.testing.assert_allclose(merged.numpy(), opcm([d.numpy() for d in deltas], alpha), rtol=0, atol=1e-10)


def test_opcm_keeps_the_mean_length_of_the_task_vectors(merge):
    base, *deltas = drawn(4, 30, 20)
    merged = merge(Setting("opcm_per_tensor", {}, {f"m{i}": {} for i in range(3)}), base, deltas) - base
    mean = torch.stack([delta.norm() for delta in deltas]).mean()
    torch.testing.assert_close(merged.norm(), mean, rtol=1e-12, atol=0)


def test_the_order_of_models_is_part_of_an_opcm_recipe():
    setting = Setting("opcm_per_tensor", {}, {"y": {}, "x": {}})
    assert list(SPECS["opcm_per_tensor"].canonical(setting).models) == ["y", "x"]


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_only_the_ratio_of_shares_matters(method, merge):
    base, x, y = drawn(3, 6, 5)
    settings = [Setting(method, {}, weighted(w, 2 * w)) for w in (0.3, 4.0)]
    assert len({str(SPECS[method].canonical(setting)) for setting in settings}) == 1
    one, other = (merge(setting, base, [x, y]) for setting in settings)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
