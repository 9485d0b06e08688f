"""Methods that mergekit has not: goldens of the authors' code, numpy, and the cases the papers leave open."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge.methods import SPECS
from evomerge.merge.methods._spectral import SKETCH, sketch
from evomerge.recipe import Setting

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
OURS = ("compeft", "emr", "iso_c", "pcb", "tsvm", "widen")
# the goldens' names of parameters, and what is no parameter of ours
RENAMED = {
    "alpha": "lambda",
    "pcb_ratio": "density",
    "above_average_value_ratio": "ratio",
    "score_calibration_value": "calibration",
}


def weighted(*weights: float) -> dict[str, dict[str, float]]:
    return {f"m{i}": {"weight": weight} for i, weight in enumerate(weights)}


def golden_setting(case: dict, count: int) -> Setting:
    values = {RENAMED.get(k, k): v for k, v in case["params"].items() if k != "variant"}
    density = {"density": values.pop("density")} if case["method"] == "compeft" else {}
    return Setting(
        case["method"], values, {name: row | density for name, row in weighted(*[1.0] * count).items()}
    )


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(rank: int, rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A task vector as an adapter has it."""
    return drawn(rows, rank, seed=seed, dtype=dtype) @ drawn(rank, columns, seed=seed + 100, dtype=dtype)


@pytest.mark.goldens("pcb", "tsvm", "iso_c", "widen")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_methods_agree_with_the_authors_code(case, dtype, merge):
    """PCB's goldens are for a whole model given as one tensor: there per tensor is the same."""
    base, *models = (
        torch.tensor(x, dtype=dtype) for x in (case["inputs"]["base"], *case["inputs"]["models"])
    )
    merged = merge(golden_setting(case, len(models)), base, [model - base for model in models])
    expected = torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.goldens("iso_c")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_iso_c_as_published_is_the_same_where_the_sum_has_full_rank(case, dtype, merge):
    base, *models = (
        torch.tensor(x, dtype=dtype) for x in (case["inputs"]["base"], *case["inputs"]["models"])
    )
    setting = Setting("iso_c", {"full_rank": True}, weighted(*[1.0] * len(models)))
    expected = torch.tensor(case["expected"], dtype=dtype)
    merged = merge(setting, base, [model - base for model in models])
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.goldens("emr")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_emr_adds_the_unified_task_vector_of_the_authors_code(case, dtype, scale, merge):
    base, *models = (
        torch.tensor(x, dtype=dtype) for x in (case["inputs"]["base"], *case["inputs"]["models"])
    )
    merged = merge(
        Setting("emr", {"lambda": scale}, weighted(1, 1, 1)), base, [model - base for model in models]
    )
    expected = base + scale * torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.goldens("compeft")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_compeft_makes_the_ternary_vector_and_sums_it_with_weights(case, dtype, merge):
    delta = torch.tensor(case["inputs"]["tau"], dtype=dtype)
    ternary = torch.tensor(case["expected"], dtype=dtype)
    setting = golden_setting(case, 2)
    setting.models["m1"]["weight"] = -0.25
    merged = merge(setting, torch.zeros_like(delta), [delta, delta])
    torch.testing.assert_close(merged, 0.75 * ternary, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def polar_by_eigenvalues(x: np.ndarray) -> np.ndarray:
    """(x x^T)^(-1/2) x over the non-zero eigenvalues: an independent way to the polar factor."""
    values, vectors = np.linalg.eigh(x.T @ x)
    keep = values > 1e-9 * values[-1]
    return x @ (vectors[:, keep] / np.sqrt(values[keep])) @ vectors[:, keep].T


def tsvm_by_numpy(deltas: list[np.ndarray], weights: list[float], ranks: list[int]) -> np.ndarray:
    count = max(1, min(deltas[0].shape) // len(deltas))
    us, ss, vs = [], [], []
    for delta, weight, rank in zip(deltas, weights, ranks, strict=True):
        u, s, vh = np.linalg.svd(weight * delta, full_matrices=False)
        kept = min(count, rank)
        us, ss, vs = [*us, u[:, :kept]], [*ss, s[:kept]], [*vs, vh[:kept].T]
    u, v = (polar_by_eigenvalues(np.concatenate(x, axis=1)) for x in (us, vs))
    return u * np.concatenate(ss) @ v.T


# below SKETCH the matrix is decomposed at once, from twice that on an adapter's is sketched
SIZES = [(9, 14), (2 * SKETCH, 2 * SKETCH + 24), (2 * SKETCH + 16, 2 * SKETCH)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tsvm_of_adapters_uses_their_own_directions_only(shape, dtype, merge):
    deltas = [low_rank(rank, *shape, seed=rank, dtype=dtype) for rank in (2, 3)]
    base, setting = drawn(*shape, dtype=dtype), Setting("tsvm", {"lambda": 0.5}, weighted(0.8, -0.3))
    expected = base.numpy() + 0.5 * tsvm_by_numpy([d.double().numpy() for d in deltas], [0.8, -0.3], [2, 3])
    merged = merge(setting, base, deltas)
    error = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), rtol=error, atol=error)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_iso_c_of_adapters_is_restricted_to_the_rank_of_their_sum(shape, dtype, merge):
    deltas = [low_rank(2, *shape, seed=seed, dtype=dtype) for seed in (1, 2)]
    base, setting = drawn(*shape, dtype=dtype), Setting("iso_c", {"lambda": 0.5}, weighted(0.8, -0.3))
    u, s, vh = np.linalg.svd((0.8 * deltas[0] - 0.3 * deltas[1]).double().numpy(), full_matrices=False)
    expected = base.numpy() + 0.5 * s[:4].mean() * u[:, :4] @ vh[:4]
    merged = merge(setting, base, deltas)
    error = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), rtol=error, atol=error)


def test_iso_c_as_published_makes_every_direction_equally_strong_even_those_of_noise(merge):
    delta, base = low_rank(2, 9, 14, seed=1, dtype=torch.float64), torch.zeros(9, 14, dtype=torch.float64)
    merged = merge(Setting("iso_c", {"full_rank": True}, weighted(1.0)), base, [delta])
    values = torch.linalg.svdvals(merged)
    expected = torch.linalg.svdvals(delta).mean().expand(9)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("shape", [(6, 4), (2 * SKETCH, 2 * SKETCH)], ids=str)
def test_tsvm_of_dense_task_vectors_is_that_of_numpy(shape, merge):
    """A rank above SKETCH: the sketch must see that it misses something."""
    deltas = [drawn(*shape, seed=seed) for seed in (1, 2)]
    full = min(shape)
    expected = tsvm_by_numpy([d.numpy() for d in deltas], [1.0, 1.0], [full, full])
    merged = merge(Setting("tsvm", {}, weighted(1, 1)), torch.zeros(shape, dtype=torch.float64), deltas)
    torch.testing.assert_close(merged, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SIZES[1:], ids=str)
def test_a_sketch_finds_the_directions_of_an_adapter_and_nothing_of_a_dense_matrix(shape):
    found = sketch(low_rank(16, *shape, seed=1, dtype=torch.float32), "here")
    assert found is not None
    assert found.s.shape == (16,)
    assert sketch(drawn(*shape, dtype=torch.float32), "here") is None


def test_tsvm_keeps_one_direction_of_each_model_where_there_are_more_models_than_directions(merge):
    deltas = [drawn(2, 5, seed=seed) for seed in range(4)]
    merged = merge(Setting("tsvm", {}, weighted(1, 1, 1, 1)), torch.zeros(2, 5, dtype=torch.float64), deltas)
    expected = tsvm_by_numpy([d.numpy() for d in deltas], [1.0] * 4, [2] * 4)
    torch.testing.assert_close(merged, torch.from_numpy(expected))


def test_tsvm_of_one_adapter_twice_is_that_adapter(merge):
    """The two share all directions: orthogonal directions halve both, and there are two of them."""
    delta, base = low_rank(2, 8, 12, seed=3, dtype=torch.float64), drawn(8, 12)
    merged = merge(Setting("tsvm", {}, weighted(1, 1)), base, [delta, delta])
    torch.testing.assert_close(merged, base + delta)


@pytest.mark.parametrize("name", ["tsvm", "iso_c"])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"])
def test_vocabulary_tensors_get_the_mean_of_the_task_vectors(name, tensor, merge):
    base, x, y = (drawn(6, 4, seed=seed) for seed in range(3))
    merged = merge(Setting(name, {"lambda": 0.5}, weighted(1.0, 0.4)), base, [x, y], name=tensor)
    torch.testing.assert_close(merged, base + 0.5 * (x + 0.4 * y) / 2)


@pytest.mark.parametrize("name", ["tsvm", "iso_c"])
def test_a_model_that_changes_nothing_counts_in_the_mean(name, merge):
    base, x = drawn(7), drawn(7, seed=1)
    merged = merge(Setting(name, {}, weighted(1, 1, 1)), base, [x, None, torch.zeros_like(x)])
    torch.testing.assert_close(merged, base + x / 3)


def test_widen_takes_the_rows_of_an_embedding_for_columns(merge):
    base, x, y = (drawn(6, 4, seed=seed) for seed in range(3))
    setting = Setting("widen", {"calibration": 0.4}, weighted(1, 0.5))
    turned = merge(setting, base.mT.contiguous(), [d.mT.contiguous() for d in (x, y)])
    merged = merge(setting, base, [x, y], name="model.embed_tokens.weight")
    torch.testing.assert_close(merged, turned.mT)
    assert not torch.equal(merged, merge(setting, base, [x, y], name="lm_head.weight"))


def widen_by_numpy(base: np.ndarray, deltas: list[np.ndarray], ratio: float, score: float) -> np.ndarray:
    """Column by column; from zeros to zeros is no turn, between zeros and anything else a right angle."""
    columns, ranks = base.shape[1], []
    for delta in deltas:
        lengths, turns = [], []
        for old, new in zip(base.T, (base + delta).T, strict=True):
            both = np.linalg.norm(old), np.linalg.norm(new)
            lengths.append(abs(both[1] - both[0]))
            turns.append(float(any(both)) if 0.0 in both else 1.0 - old @ new / both[0] / both[1])
        places = np.empty((2, columns))
        for place, change in zip(places, (lengths, turns), strict=True):
            place[np.argsort(change, kind="stable")] = np.arange(columns) / columns
        ranks.append(places)
    shares = np.exp(ranks) / np.exp(ranks).sum(axis=0)
    important = np.array(ranks) > ratio * np.mean(ranks, axis=2, keepdims=True)
    scores = np.where(important, score, shares).mean(axis=1)
    return base + sum(s * d for s, d in zip(scores, deltas, strict=True))


def compare_widen(merge, base: torch.Tensor, deltas: list[torch.Tensor]) -> None:
    setting = Setting("widen", {"ratio": 1.2, "calibration": 0.9}, weighted(*[1.0] * len(deltas)))
    expected = widen_by_numpy(base.numpy(), [delta.numpy() for delta in deltas], 1.2, 0.9)
    torch.testing.assert_close(merge(setting, base, deltas), torch.from_numpy(expected))


def test_widen_sums_columns_over_several_blocks_of_rows(merge):
    base, x, y = (drawn(2000, 40, seed=seed) for seed in range(3))
    compare_widen(merge, base, [x, y])


@pytest.mark.parametrize("seed", range(5))
def test_widen_gives_columns_of_zeros_a_direction(seed, merge):
    base, x, y = (drawn(4, 9, seed=10 * seed + i) for i in range(3))
    base[:, :4] = 0.0
    x[:, :3] = y[:, 0] = 0.0
    compare_widen(merge, base, [x, y])


def test_pcb_keeps_all_of_a_tensor_of_one_entry_where_models_agree(merge):
    base = torch.ones(1, dtype=torch.float64)
    setting = Setting("pcb", {}, weighted(1, 1))
    up, down = torch.full_like(base, 0.25), torch.full_like(base, -0.125)
    torch.testing.assert_close(merge(setting, base, [up, 2 * up]), base + 0.375)
    # the sum is positive: only the first agrees with it
    torch.testing.assert_close(merge(setting, base, [up, down]), base + 0.25)


def test_pcb_of_the_least_density_keeps_the_strongest_entry(merge):
    delta = torch.tensor([0.5, -3.0, 1.0, 2.0, 0.25], dtype=torch.float64)
    setting = Setting("pcb", {"density": 1e-6, "clip": 0.0}, weighted(1.0))
    expected = torch.tensor([0.0, -3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(merge(setting, torch.zeros_like(delta), [delta]), expected)


def test_emr_elects_minus_where_task_vectors_cancel(merge):
    """The authors' code: + where the mean is above 0, - where it is not."""
    delta = torch.tensor([1.0, -2.0])
    merged = merge(Setting("emr", {}, weighted(1, 1)), torch.zeros(2), [delta, -delta])
    assert merged.tolist() == [-1.0, -2.0]


def test_pcb_of_many_models_does_not_overflow(merge):
    deltas = [drawn(200, seed=seed, dtype=torch.float32) * 1e-4 for seed in range(100)]
    merged = merge(Setting("pcb", {}, weighted(*[1.0] * 100)), torch.zeros(200), deltas)
    assert merged.isfinite().all()
    assert merged.any()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(7,), (1,), (5, 6), (3, 2, 2)], ids=str)
def test_zero_task_vectors_keep_the_base_bit_by_bit(name, shape, merge):
    base, zero = drawn(*shape), torch.zeros(shape, dtype=torch.float64)
    assert torch.equal(merge(Setting(name, {}, weighted(1, 1)), base, [zero, None]), base)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(1,), (1, 5), (5, 1), (3, 2, 2)], ids=str)
def test_shapes_without_much_to_decompose_or_rank_are_merged(name, shape, merge):
    base, x, y = (drawn(*shape, seed=seed) for seed in range(3))
    merged = merge(Setting(name, {}, weighted(1, 1, 1)), base, [x, y, x])
    assert merged.shape == base.shape
    assert merged.isfinite().all()


@pytest.mark.parametrize("name", OURS)
def test_a_missing_task_vector_is_a_zero_one_in_a_matrix(name, merge):
    base, x, y = (drawn(8, 12, seed=seed) for seed in range(3))
    setting = Setting(name, {}, weighted(0.5, 1, 1))
    zero = merge(setting, base, [x, y, torch.zeros_like(x)])
    assert torch.equal(merge(setting, base, [x, y, None]), zero)


@pytest.mark.parametrize("name", [name for name in OURS if SPECS[name].unchanged_is_absent])
def test_a_model_that_changes_nothing_is_absent_where_the_method_says_so(name, merge):
    base, x, y = (drawn(8, 12, seed=seed) for seed in range(3))
    three = merge(Setting(name, {}, weighted(0.5, 1, 1)), base, [x, y, None])
    assert torch.equal(merge(Setting(name, {}, weighted(0.5, 1)), base, [x, y]), three)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_the_chunk_size_does_not_change_a_bit_of_a_matrix(name, chunk, merge):
    base, x, y = (drawn(15, 20, seed=seed, dtype=torch.float32) for seed in range(3))
    setting = Setting(name, {"lambda": 0.7}, weighted(0.3, 1.2))
    assert torch.equal(merge(setting, base, [x, y], chunk=chunk), merge(setting, base, [x, y]))


WEIGHTS = [(1.0, 1.0), (0.0, 0.7), (0.5, 0.0), (-0.4, 0.9), (1e-7, 1.0), (0.3, 0.3)]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scale", [1.0, 0.6, -1.2])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_canonical_does_not_change_the_merge_of_a_matrix(name, scale, weights, merge):
    base, x, y = (drawn(8, 12, seed=seed) for seed in range(3))
    setting = Setting(name, {"lambda": scale}, weighted(*weights))
    canonical = SPECS[name].canonical(setting)
    deltas = [{"m0": x, "m1": y}[model] for model in canonical.models]
    merged = merge(setting, base, [x, y])
    torch.testing.assert_close(merge(canonical, base, deltas), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tsvm", "emr", "widen"])
def test_one_model_alone_is_task_arithmetic(name):
    one = Setting(name, {"lambda": 0.5}, {"x": {"weight": 0.8}, "y": {"weight": 0.0}})
    other = Setting("task_arithmetic", {}, {"x": {"weight": 0.4}})
    assert SPECS[name].canonical(one) == SPECS["task_arithmetic"].canonical(other)


class Memory(dict):
    """A `once` that remembers, and knows what it holds."""

    def __call__(self, key, compute):
        if key not in self:
            self[key] = compute()
        return self[key]

    @property
    def nbytes(self) -> int:
        return sum(getattr(value, "nbytes", 0) for value in self.values())


@pytest.mark.parametrize("name", OURS)
def test_what_is_remembered_of_the_sources_serves_other_settings(name, merge):
    """Weights, signs and the set of models change from candidate to candidate."""
    size = 2 * SKETCH
    base = drawn(size, size, dtype=torch.float32)
    deltas = [low_rank(2, size, size, seed=seed, dtype=torch.float32) for seed in range(3)]
    memory = Memory()
    for weights in [(1, 1, 1), (0.5, -0.2, 0), (1, 0, 0.3), (0.1, 0.2, 0.3)]:
        setting = Setting(name, {}, weighted(*weights))
        assert torch.equal(merge(setting, base, deltas, once=memory), merge(setting, base, deltas))


@pytest.mark.parametrize("name", ["tsvm", "iso_c"])
def test_of_an_adapter_only_few_directions_are_remembered(name, merge):
    size, memory = 2 * SKETCH, Memory()
    base = drawn(size, size, dtype=torch.float32)
    deltas = [low_rank(2, size, size, seed=seed, dtype=torch.float32) for seed in range(2)]
    merge(Setting(name, {}, weighted(1, 1)), base, deltas, once=memory)
    # directions of two models, and those of both made orthogonal; 2 % for the small rest
    assert memory.nbytes < 1.02 * 4 * (2 * size * 2) * (2 + 2)


@pytest.mark.parametrize("name", ["tsvm", "iso_c"])
def test_a_source_with_values_that_are_not_finite_is_named(name, merge):
    base, x, y = (drawn(5, 6, seed=seed) for seed in range(3))
    x[2, 3] = float("nan")
    with pytest.raises(RecipeError, match=r"here: the singular directions.*not finite"):
        merge(Setting(name, {}, weighted(1, 1)), base, [x, y], where="here")


@pytest.mark.parametrize(
    ("name", "shared", "message"),
    [
        ("pcb", {"density": 0.0}, r"density is 0.0.*must be in \(0, 1\]"),
        ("pcb", {"clip": 0.5}, r"clip is 0.5.*must be in \[0, 0.49\]"),
        ("widen", {"ratio": -0.1}, r"ratio is -0.1.*must be in \[0, inf\)"),
        ("iso_c", {"full_rank": 1}, "full_rank is 1, but it must be true or false"),
        ("tsvm", {"alpha": 1.0}, "tsvm has no parameter `alpha`"),
    ],
)
def test_values_out_of_range_are_refused(name, shared, message):
    with pytest.raises(RecipeError, match=message):
        SPECS[name].complete(Setting(name, shared, weighted(1.0)), "test")
