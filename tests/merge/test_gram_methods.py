"""Spheres, Model Stock, NearSwap and Fusion against their definitions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge.methods import METHODS, SPECS
from evomerge.merge.methods._gram import Split, gram
from evomerge.merge.methods._method import CHUNK, TensorInputs
from evomerge.recipe import Setting


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"weight": value} for name, value in values.items()}


def by_vector(columns: bool, **fixed: bool) -> Setting:
    shared = {"nuslerp_flatten": False, "nuslerp_row_wise": columns, **fixed}
    return Setting("nuslerp", shared, weights(x=0.3, y=0.8))


@pytest.mark.parametrize("task_vectors", [True, False])
@pytest.mark.parametrize("shape", [(5, 9), (3, CHUNK + 7), (CHUNK + 7, 3)])
def test_nuslerp_by_rows_merges_every_row_as_a_tensor(merge, shape, task_vectors):
    base, x, y = draw(3, *shape)
    setting = by_vector(False, task_vectors=task_vectors)
    some = [0, 1, shape[0] - 1]
    rows = [merge(setting, base[i], [x[i], y[i]]) for i in some]
    merged = merge(setting, base, [x, y])
    torch.testing.assert_close(merged[some], torch.stack(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 9), (3, CHUNK + 7), (CHUNK + 7, 3)])
def test_nuslerp_by_columns_is_that_by_rows_of_the_transpose(merge, shape):
    base, x, y = draw(3, *shape)
    rows = merge(by_vector(False), base.T.contiguous(), [x.T.contiguous(), y.T.contiguous()])
    torch.testing.assert_close(merge(by_vector(True), base, [x, y]), rows.T, rtol=1e-12, atol=1e-12)


def test_vectors_of_a_tensor_of_three_dimensions_run_along_the_last_or_the_first(merge):
    base, x, y = draw(3, 4, 5, 6)
    last, first = merge(by_vector(False), base, [x, y]), merge(by_vector(True), base, [x, y])
    row = merge(by_vector(False), base[1, 2], [x[1, 2], y[1, 2]])
    column = merge(by_vector(False), base[:, 1, 2], [x[:, 1, 2], y[:, 1, 2]])
    torch.testing.assert_close(last[1, 2], row, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first[:, 1, 2], column, rtol=1e-12, atol=1e-12)


def test_model_stock_by_filters_merges_every_row_as_a_tensor(merge):
    base, x, y = draw(3, 4, 5, 6)
    models = {"x": {}, "y": {}}
    merged = merge(Setting("model_stock", {"filter_wise": True}, models), base, [x, y])
    row = merge(Setting("model_stock", {}, models), base[1, 2], [x[1, 2], y[1, 2]])
    torch.testing.assert_close(merged[1, 2], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(
    "setting",
    [by_vector(False), by_vector(True), Setting("model_stock", {"filter_wise": True}, {"x": {}, "y": {}})],
    ids=["rows", "columns", "filters"],
)
def test_the_chunk_size_does_not_change_a_bit_of_row_and_column_merges(merge, setting, chunk):
    base, x, y = draw(3, 7, 11, dtype=torch.float32)
    whole = merge(setting, base, [x, y])
    assert torch.equal(merge(setting, base, [x, y], chunk=chunk), whole)


def test_equal_models_merge_to_themselves_on_every_sphere(merge):
    base, x = draw(2, 6, 9)
    for setting in (
        Setting("nuslerp", {}, weights(x=1.0, y=2.0)),
        Setting("nuslerp", {"task_vectors": False}, weights(x=1.0, y=2.0)),
        Setting("multislerp", {}, weights(x=1.0, y=2.0)),
        Setting("multislerp", {"task_vectors": False}, weights(x=1.0, y=2.0)),
        Setting("karcher", {}, {"x": {}, "y": {}}),
    ):
        torch.testing.assert_close(merge(setting, base, [x, x]), base + x, rtol=1e-8, atol=1e-8)


def test_opposite_vectors_are_interpolated_on_the_line(merge):
    base, x = torch.zeros(40).double(), draw(40)
    merged = merge(Setting("nuslerp", {}, weights(x=3.0, y=1.0)), base, [x, -x])
    torch.testing.assert_close(merged, 0.5 * x, rtol=1e-12, atol=1e-12)


def test_the_directions_average_to_zero_in_the_tangent_space_of_the_karcher_mean(merge):
    """Karcher 1977: sum_i log_mu(u_i) = 0; the length is the mean length."""
    base, *deltas = draw(5, 300)
    models = {name: {} for name in "abcd"}
    merged = merge(Setting("karcher", {"max_iter": 100, "tol": 1e-10}, models), base, deltas)
    thetas = torch.stack([base + delta for delta in deltas])
    units, mu = thetas / thetas.norm(dim=1, keepdim=True), merged / merged.norm()
    cosine = (units @ mu).unsqueeze(1)
    logs = cosine.acos() / (1 - cosine**2).sqrt() * (units - cosine * mu)
    assert logs.sum(0).norm() < 1e-8
    assert float(merged.norm()) == pytest.approx(float(thetas.norm(dim=1).mean()), rel=1e-12)


def test_antipodal_directions_have_the_first_as_their_karcher_mean(merge):
    x = draw(20)
    merged = merge(Setting("karcher", {}, {"x": {}, "y": {}}), torch.zeros(20).double(), [x, -x])
    torch.testing.assert_close(merged, x, rtol=1e-12, atol=1e-12)


def test_tensors_too_short_for_a_direction_give_zero(merge):
    x = 1e-7 * draw(20)
    merged = merge(Setting("karcher", {}, {"x": {}, "y": {}}), torch.zeros(20).double(), [x, 2 * x])
    assert not merged.any()


def test_multislerp_lies_in_the_mean_direction_at_the_mean_length(merge):
    base, x, y, z = draw(4, 50)
    merged = merge(Setting("multislerp", {}, weights(x=1.0, y=2.0, z=5.0)), base, [x, y, z]) - base
    mean = sum(w * v / v.norm() for w, v in ((1, x), (2, y), (5, z)))
    expected = mean / mean.norm() * sum(w * v.norm() for w, v in ((1, x), (2, y), (5, z))) / 8
    torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-7)


def test_multislerp_refuses_weights_that_cancel(merge):
    with pytest.raises(RecipeError, match=r"weights of multislerp sum to 0.*`normalize_weights` to false"):
        merge(Setting("multislerp", {}, weights(x=1.0, y=-1.0)), draw(9), [draw(9), draw(9, seed=1)])


def test_multislerp_refuses_directions_that_cancel(merge):
    x = torch.tensor([1.0, 0.0]).double()
    y = torch.tensor([0.0, 1.0]).double()
    setting = Setting("multislerp", {}, {name: {"weight": 1.0} for name in "abcd"})
    with pytest.raises(RecipeError, match=r"directions of the models cancel.*change a weight"):
        merge(setting, x, [x, -x, y, -y])


def test_three_missing_task_vectors_leave_the_base(merge):
    base = draw(9)
    for method in ("multislerp", "model_stock"):
        values = {"weight": 1.0} if "weight" in SPECS[method].per_model else {}
        setting = Setting(method, {}, {name: values for name in "abc"})
        assert torch.equal(merge(setting, base, [None] * 3), base)


def test_weights_of_whole_models_that_are_not_normalised_scale_the_base():
    shared = {"task_vectors": False, "normalize_weights": False}
    setting = SPECS["multislerp"].complete(Setting("multislerp", shared, weights(x=0.5, y=0.4)), "test")
    assert not METHODS["multislerp"].keeps_base(setting)


def test_products_are_measured_once_for_all_candidates():
    base, x, y = draw(3, 60)
    counts, kept = Counter(), {}

    def once(key, compute):
        if key not in kept:
            counts[key] += 1
            kept[key] = compute()
        return kept[key]

    for method, values in (("nuslerp", 0.3), ("nuslerp", 0.9), ("multislerp", 0.2), ("model_stock", None)):
        models = {"x": {}, "y": {}} if values is None else weights(x=values, y=0.5)
        setting = SPECS[method].complete(Setting(method, {}, models), "test")
        METHODS[method].merge(TensorInputs(base, [x, y], setting, torch.float64, (60,), once=once))
    assert list(counts.values()) == [1]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("split", [Split(1, 2 * CHUNK + 3), Split(9, 700), Split(9, 700, along=0)], ids=str)
def test_products_are_those_of_the_whole_vectors(split, whole):
    shape = (split.rows, split.columns)
    base, x, y = draw(3, *shape)
    setting = Setting("model_stock", {}, {"x": {}, "y": {}})
    inputs = TensorInputs(base.view(-1), [x.view(-1), y.view(-1)], setting, torch.float64, shape)
    vectors = torch.stack([base * whole + x, base * whole + y])
    expected = torch.einsum("irc,jrc->ij" + "cr"[split.along], vectors, vectors)
    if split.count == 1:
        expected = expected.reshape(2, 2, 1)
    torch.testing.assert_close(gram(inputs, split, whole=whole), expected, rtol=1e-11, atol=1e-9)


def test_nearswap_moves_no_entry_further_than_t_and_near_ones_all_the_way(merge):
    base, x = draw(2, 500)
    moved = merge(Setting("nearswap", {"t": 0.3}, {"x": {}}), base, [x]) - base
    near = x.abs() <= 0.3
    torch.testing.assert_close(moved, torch.where(near, x, 0.3 * x.sign()), rtol=1e-12, atol=1e-12)


def test_fusion_takes_exact_quantiles_of_more_than_a_million_entries(merge):
    """Sorted with numpy, from the definition; mergekit would draw a sample here."""
    base, delta = 0.1 * draw(1100, 1000), 0.01 * draw(1100, 1000, seed=1)
    merged = merge(Setting("arcee_fusion", {}, {"x": {}}), base, [delta])
    p, q = (torch.softmax(t, -1).numpy() + 1e-8 for t in (base + delta, base))
    score = delta.abs().numpy() * (p * np.log(p / q)).sum(-1, keepdims=True)
    ordered, last = np.sort(score.ravel()), score.size - 1
    first, middle, third = (ordered[int(share * last)] for share in (0.25, 0.5, 0.75))
    taken = torch.from_numpy(score >= middle + 1.5 * (third - first))
    assert 0.01 < taken.double().mean() < 0.5
    assert torch.equal(merged, torch.where(taken, base + delta, base))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting("nearswap", {"t": -0.1}, {"x": {}}), r"t is -0.1, .*must be in \[0, inf\)"),
        (Setting("nearswap", {"t": 0.1}, {"x": {}, "y": {}}), "nearswap has 2 models, but it merges 1"),
        (Setting("karcher", {"max_iter": 2.5}, {"x": {}}), "max_iter is 2.5, but it must be a whole number"),
        (Setting("karcher", {"tol": 0.0}, {"x": {}}), r"tol is 0.0, .*must be in \(0, inf\)"),
        (Setting("karcher", {}, {"x": {"weight": 1.0}}), "karcher has no parameter `weight`"),
        (Setting("multislerp", {"eps": 0.0}, weights(x=1)), r"eps is 0.0, .*must be in \(0, inf\)"),
        (Setting("nuslerp", {}, weights(x=1)), "nuslerp has 1 models, but it merges 2"),
        (Setting("model_stock", {}, {"x": {}}), "model_stock has 1 models, but it merges at least 2"),
    ],
    ids=str,
)
def test_what_the_methods_refuse(setting, message):
    with pytest.raises(RecipeError, match=message):
        SPECS[setting.method].complete(setting, "test")
