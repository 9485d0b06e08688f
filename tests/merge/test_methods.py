"""Merge methods against goldens made with mergekit 0.1.5, and their settings against each other."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge.methods import METHODS, SPECS
from evomerge.recipe import BASE_COPY, Setting

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
MODELS = ("x", "y", "z")


def golden_setting(case: dict, names: list[str]) -> Setting:
    """The setting of a golden; `int8_mask` only changes memory in mergekit and is not a parameter here."""
    parameters = {key: value for key, value in case["params"].items() if key != "int8_mask"}
    columns = case["per_model"]
    models = {name: {key: columns[key][i] for key in columns} for i, name in enumerate(names)}
    if "task_vectors" in SPECS[case["method"]].shared:
        parameters["task_vectors"] = case["inputs"]["base"] is not None
    return Setting(case["method"], parameters, models)


@pytest.mark.goldens("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
@pytest.mark.goldens("breadcrumbs", "breadcrumbs_ties", "della", "sce", "ram", "ramplus_tl")
@pytest.mark.goldens("nuslerp", "multislerp", "karcher", "model_stock")
@pytest.mark.goldens("nearswap", "arcee_fusion", "passthrough")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_methods_agree_with_mergekit(case, dtype, merge):
    """Dyadic inputs: task vectors are exact, so the tolerance is that of the merge alone."""
    models = [torch.tensor(model, dtype=dtype) for model in case["inputs"]["models"]]
    base = models[0] if case["inputs"]["base"] is None else torch.tensor(case["inputs"]["base"], dtype=dtype)
    setting = golden_setting(case, [f"m{i}" for i in range(len(models))])
    merged = merge(setting, base, [model - base for model in models], seeds=(0,) * len(models))
    expected = torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.goldens("slerp")
def test_slerp_of_two_models_is_the_slerp_from_the_first_to_the_second(case, merge):
    first = torch.tensor(case["inputs"]["base"], dtype=torch.float64)
    second = torch.tensor(case["inputs"]["models"][0], dtype=torch.float64)
    base = torch.linspace(-1.0, 1.0, first.numel(), dtype=torch.float64).reshape(first.shape)
    setting = Setting("slerp", case["params"], {"m0": {}, "m1": {}})
    merged = merge(setting, base, [first - base, second - base])
    torch.testing.assert_close(merged, torch.tensor(case["expected"]).double(), rtol=0, atol=1e-7)


def test_reading_the_specs_does_not_import_torch():
    code = "import sys, evomerge.merge.methods, evomerge.merge.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def random_setting(name: str, rng: random.Random) -> Setting:
    """A valid setting; zeros, ones and equal values are frequent, because canonical forms turn on them."""
    spec = SPECS[name]
    count = rng.randint(max(1, spec.min_models), spec.max_models or 3)
    usual = {
        "weight": [0.0, 0.5, 1.0, 1.0, -0.5, rng.uniform(-1, 2), rng.uniform(0, 2)],
        "density": [1.0, 1.0, 0.5, round(rng.uniform(0.05, 1), 3)],
        "lambda": [0.0, 1.0, 1.0, 0.7, -1.2, rng.uniform(0, 2)],
        "t": [0.0, 1.0, rng.uniform(0, 1), rng.uniform(-0.2, 1.2)],
        "scale": [0.0, 1.0, -0.5, rng.uniform(0, 2)],
        "max_iter": [0, 1, 10, 10.0],
        "tol": [1e-5, 1e-9],
        "eps": [1e-8, 0.1],
        "gamma": [0.0, 0.01, 0.3, 1.0],
        "epsilon": [0.0, 0.2, 0.05, round(rng.uniform(0, 0.5), 3)],
        "select_topk": [0.0, 1.0, 0.5, rng.uniform(0, 1)],
        "r": [0.0, 0.1, 2.0],
        "alpha": [0.0, 0.2, 3.0],
        "clip": [0.0, 1e-4, 0.1],
        "ratio": [0.5, 1.0, rng.uniform(0, 2)],
        "calibration": [1.0, 0.4, rng.uniform(0, 2)],
        "floor": [1e-6, 0.1],
        "off_diagonal": [0.0, 0.9, 1.0],
        "ridge": [1e-6, 0.1],
        "power": [0.0, 0.5, 1.0],
        "threshold": [0.0, 0.0, 0.3],
    }
    positive = rng.random() < 0.5

    def draw(names):
        values = {
            key: rng.choice([False, True] if names[key].kind == "bool" else usual[key])
            for key in names
            if rng.random() < 0.9 or key in ("weight", "t")
        }
        values = {key: min(max(v, names[key].low), names[key].high) for key, v in values.items()}
        return {key: abs(v) if positive and key == "weight" else v for key, v in values.items()}

    models = {model: draw(spec.per_model) for model in rng.sample(MODELS, count)}
    if "epsilon" in spec.per_model:  # its limit depends on the density
        for values in models.values():
            density = values.get("density", 1.0)
            most = 0.95 * min(density, 1 - density) if density < 1 else 0.5
            values["epsilon"] = min(values.get("epsilon", 0.0), most)
    return Setting(name, draw(spec.shared), models)


@pytest.mark.parametrize("name", SPECS)
def test_canonical_is_idempotent(name):
    rng = random.Random(0)
    for _ in range(400):
        once = SPECS[name].canonical(random_setting(name, rng))
        assert SPECS[once.method].canonical(once) == once


@pytest.mark.parametrize("name", SPECS)
def test_canonical_does_not_change_the_merge(name, merge):
    """Values are rounded to 6 decimals: half a unit in three weights and lambda moves entries by < 1e-5."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    base, *rows = torch.randn(4, 500, generator=generator, dtype=torch.float64)
    deltas = dict(zip(MODELS, rows * 1, strict=True))
    seeds = {model: 7 + i for i, model in enumerate(MODELS)}
    compared = 0

    def result(setting):
        names = list(setting.models)
        return merge(
            setting, base, [deltas[model] for model in names], seeds=tuple(seeds[model] for model in names)
        )

    for _ in range(200):
        setting = random_setting(name, rng)
        try:
            expected = result(setting)
        except RecipeError:
            continue
        if expected.abs().max() > 50:  # a nearly vanishing divisor magnifies the rounding as well
            continue
        merged = result(SPECS[name].canonical(setting))
        torch.testing.assert_close(
            merged, expected, rtol=1e-5, atol=1e-5, msg=lambda m, s=setting: f"{s}\n{m}"
        )
        compared += 1
    assert compared > 100


def weights(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"weight": value} for name, value in values.items()}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            Setting("task_arithmetic", {"lambda": 0.5}, weights(x=1.0)),
            Setting("task_arithmetic", {}, weights(x=0.5)),
        ),
        (Setting("task_arithmetic", {}, weights(x=0.0)), BASE_COPY),
        (Setting("ties", {"lambda": 0.0}, weights(x=1.0, y=1.0)), BASE_COPY),
        (
            Setting("dare_linear", {}, weights(x=0.3, y=0.2)),
            Setting("task_arithmetic", {}, weights(x=0.3, y=0.2)),
        ),
        (
            Setting("dare_ties", {"normalize": True}, weights(x=1.0, y=2.0)),
            Setting("ties", {}, weights(x=1, y=2)),
        ),
        (
            Setting("ties", {}, weights(x=0.3, y=0.3, z=0.3)),
            Setting("ties", {}, weights(x=1.0, y=1.0, z=1.0)),
        ),
        (Setting("ties", {}, weights(x=0.3)), Setting("task_arithmetic", {}, weights(x=1.0))),
        (Setting("ties", {}, weights(x=0.3, y=0.0, z=1.0)), Setting("ties", {}, weights(x=0.3, z=1.0))),
        (Setting("linear", {}, weights(x=2.0, y=2.0)), Setting("linear", {}, weights(x=0.5, y=0.5))),
        (
            Setting("breadcrumbs", {}, weights(x=0.3, y=0.2)),
            Setting("task_arithmetic", {}, weights(x=0.3, y=0.2)),
        ),
        (
            Setting("breadcrumbs_ties", {"normalize": True}, weights(x=1.0, y=2.0)),
            Setting("ties", {}, weights(x=1, y=2)),
        ),
        (
            Setting("breadcrumbs_ties", {}, {"x": {"weight": 0.5, "density": 0.3, "gamma": 0.1}}),
            Setting("breadcrumbs", {"lambda": 0.5}, {"x": {"weight": 1.0, "density": 0.3, "gamma": 0.1}}),
        ),
        (
            Setting(
                "breadcrumbs", {}, {"x": {"weight": 1.0, "gamma": 0.3}, "y": {"weight": 1, "density": 0.5}}
            ),
            Setting("breadcrumbs", {}, {"x": {"weight": 1.0}, "y": {"weight": 1.0, "density": 0.5}}),
        ),
        (
            Setting("della", {}, {"x": {"weight": 1.0, "epsilon": 0.0}, "y": {"weight": 1.0}}),
            Setting("ties", {}, weights(x=1.0, y=1.0)),
        ),
        (
            Setting("della_linear", {}, {"x": {"weight": 0.5, "density": 0.3, "epsilon": 0.0}}),
            Setting("dare_linear", {}, {"x": {"weight": 0.5, "density": 0.3}}),
        ),
        (
            Setting("della", {}, {m: {"weight": 1.0, "density": 0.3, "epsilon": 0.0} for m in "xy"}),
            Setting("dare_ties", {"normalize": True}, {m: {"weight": 1.0, "density": 0.3} for m in "xy"}),
        ),
        (Setting("sce", {"select_topk": 0.0}, {"x": {}, "y": {}}), BASE_COPY),
        (Setting("sce", {"select_topk": 0.9}, {"x": {}}), BASE_COPY),
        (Setting("sce", {}, {"x": {}}), Setting("task_arithmetic", {}, weights(x=1.0))),
        (Setting("ram", {"epsilon": 0.0}, {"x": {}}), Setting("task_arithmetic", {}, weights(x=1.0))),
        (Setting("ramplus_tl", {}, {"x": {}}), Setting("ram", {}, {"x": {}})),
        (Setting("ramplus_tl", {"r": 0.0}, {"x": {}, "y": {}}), Setting("ram", {}, {"x": {}, "y": {}})),
        (Setting("slerp", {"t": 0.0}, {"x": {}}), BASE_COPY),
        (Setting("slerp", {"t": 1.0}, {"x": {}, "y": {}}), Setting("linear", {}, weights(y=3.0))),
        (Setting("nuslerp", {}, weights(x=0.0, y=0.4)), Setting("linear", {}, weights(y=1.0))),
        (Setting("nuslerp", {}, weights(x=2.0, y=2.0)), Setting("nuslerp", {}, weights(x=0.3, y=0.3))),
        (
            Setting("nuslerp", {"nuslerp_row_wise": True}, weights(x=1.0, y=2.0)),
            Setting("nuslerp", {}, weights(x=1.0, y=2.0)),
        ),
        (Setting("multislerp", {}, weights(x=2.0, y=0.0)), Setting("linear", {}, weights(x=1.0))),
        (
            Setting("multislerp", {}, weights(x=2.0, y=0.0, z=2.0)),
            Setting("multislerp", {}, weights(x=0.5, z=0.5)),
        ),
        (Setting("karcher", {"max_iter": 3.0}, {"x": {}}), Setting("linear", {}, weights(x=1.0))),
        (Setting("nearswap", {"t": 0.0}, {"x": {}}), BASE_COPY),
        (Setting("passthrough", {}, {"x": {}}), Setting("linear", {}, weights(x=0.5))),
        (
            Setting("passthrough", {}, {"x": {"scale": 0.5}}),
            Setting("linear", {"normalize": False}, weights(x=0.5)),
        ),
    ],
    ids=lambda setting: setting.method,
)
def test_settings_with_equal_results_have_one_canonical_form(one, other):
    assert SPECS[one.method].canonical(one) == SPECS[other.method].canonical(other)


@pytest.mark.parametrize(
    "name", [n for n, spec in SPECS.items() if "weight" in spec.per_model and spec.min_models < 2]
)
def test_a_model_of_weight_zero_takes_no_part(name, merge):
    base, x, y = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    sparse = {"density": 0.4} if "density" in SPECS[name].per_model else {}
    models = {"x": {"weight": 0.6, **sparse}, "y": {"weight": 0.0, **sparse}}
    with_zero = merge(Setting(name, {}, models), base, [x, y], seeds=(3, 4))
    models.pop("y")
    assert torch.equal(with_zero, merge(Setting(name, {}, models), base, [x], seeds=(3,)))


def usual_setting(name: str) -> Setting:
    """Two models where the method takes two; no parameter at a value that makes it trivial."""
    spec = SPECS[name]
    usual = {"weight": 0.3, "density": 0.7, "scale": 0.6, "lambda": 0.7, "t": 0.3}
    usual |= {"rescale": True, "normalize": True, "gamma": 0.1, "epsilon": 0.2}
    usual |= {"select_topk": 0.5, "r": 0.5, "alpha": 2.0}
    values = {key: usual[key] for key in spec.per_model if key in usual}
    shared = {key: min(usual[key], p.high) for key, p in spec.shared.items() if key in usual}
    return Setting(name, shared, {model: values for model in MODELS[: min(2, spec.max_models or 2)]})


@pytest.mark.parametrize("name", SPECS)
def test_a_missing_task_vector_is_a_zero_one(name, merge):
    base, x = torch.randn(2, 300, generator=torch.Generator().manual_seed(3))
    setting = usual_setting(name)
    ours, theirs = ([x, last][-len(setting.models) :] for last in (None, torch.zeros(300)))
    zero = merge(setting, base, theirs, seeds=(3, 4))
    torch.testing.assert_close(merge(setting, base, ours, seeds=(3, 4)), zero, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 299])
def test_the_chunk_size_does_not_change_a_bit(name, chunk, merge):
    base, x, y = torch.randn(3, 300, generator=torch.Generator().manual_seed(4))
    setting = usual_setting(name)
    deltas = [x, y][: len(setting.models)]
    whole = merge(setting, base, deltas, seeds=(3, 4))
    assert torch.equal(merge(setting, base, deltas, seeds=(3, 4), chunk=chunk), whole)


def test_an_average_over_weights_that_cancel_is_refused(merge):
    base = torch.ones(3)
    with pytest.raises(RecipeError, match=r"weights of linear sum to .*set `normalize` to false"):
        merge(Setting("linear", {}, weights(x=0.3, y=-0.3)), base, [base, base])


@pytest.mark.parametrize(
    ("name", "shared", "values", "message"),
    [
        ("ties", {}, {"weight": 1.0, "density": 0.0}, r"density is 0.0.*must be in \(0, 1\]"),
        ("dare_linear", {}, {"weight": 1.0, "density": 1.5}, r"density is 1.5.*must be in \(0, 1\]"),
        ("task_arithmetic", {}, {"weight": float("inf")}, "weight is inf.*finite"),
        ("task_arithmetic", {}, {}, "needs `weight`"),
        ("slerp", {}, {}, "needs `t`"),
        ("linear", {"normalize": 1.0}, {"weight": 1.0}, "true or false"),
    ],
)
def test_values_out_of_range_are_refused(name, shared, values, message):
    with pytest.raises(RecipeError, match=message):
        SPECS[name].complete(Setting(name, shared, {"x": values}), "test")


def test_slerp_refuses_three_models():
    with pytest.raises(RecipeError, match="slerp has 3 models, but it merges 1 to 2"):
        SPECS["slerp"].complete(Setting("slerp", {"t": 0.5}, {"x": {}, "y": {}, "z": {}}), "test")


def test_every_method_is_found_under_its_own_name():
    assert all(method.spec.name == name for name, method in METHODS.items())
