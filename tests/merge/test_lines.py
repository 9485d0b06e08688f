"""LiNeS: the space's `lines` against goldens of the authors' code, for every method that has `lambda`."""

from __future__ import annotations

import pytest
import torch

from evomerge.merge.methods import SPECS
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.layout import Layout
from evomerge.space import Family, SearchSpace
from evomerge.yamlfile import validate
from tests.family import tensor_names

DECIMALS = 0.5e-6  # recipes hold 6 decimals
FINAL = Cell(None, "norm")
WIDE = {"low": -2.0, "high": 2.0}


def decoded(method: str, n_layers: int, n_models: int, alpha: float, beta: float) -> Recipe:
    """The recipe of every model at weight 1 in every cell."""
    data = {
        "layers": {"lines": {"alpha": WIDE, "beta": WIDE}},
        "outside": "first",
        "methods": [method],
        "parameters": {},
        "constants": {"weight": 1.0},
    }
    layout = Layout(tensor_names(n_layers))
    models = {f"m{i}": set(layout.by_cell) for i in range(n_models)}
    space = validate(SearchSpace, data, "lines.yaml").bind(Family(layout, models, SPECS))
    return space.decode({"all.lines.alpha": alpha, "all.lines.beta": beta})


def place(layer: int | None) -> Cell:
    return FINAL if layer is None else Cell(layer, "mlp")


@pytest.mark.goldens("lines")
def test_the_scale_of_every_layer_is_that_of_the_authors_code(case):
    layers = case["inputs"]["num_layers"]
    recipe = decoded("task_arithmetic", layers, 1, **case["params"])
    places = [place(layer) for layer in (*range(layers), None)]
    scales = [recipe.setting(cell).models["m0"]["weight"] for cell in places]
    assert scales == pytest.approx(case["expected"], abs=1.01 * DECIMALS, rel=0)


@pytest.mark.goldens("lines_on_task_arithmetic")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_task_arithmetic_under_lines_is_that_of_the_authors_code(case, dtype, merge):
    base, *models = (
        torch.tensor(x, dtype=dtype) for x in (case["inputs"]["base"], *case["inputs"]["models"])
    )
    params = case["params"]
    recipe = decoded("task_arithmetic", params["num_layers"], len(models), params["alpha"], params["beta"])
    merged = merge(recipe.setting(place(params["layer"])), base, [model - base for model in models])
    expected = torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=0, atol=len(models) * DECIMALS + 1e-6)


@pytest.mark.parametrize(
    "name", [name for name, spec in SPECS.items() if "lambda" in spec.shared and "weight" in spec.per_model]
)
@pytest.mark.parametrize("layer", [0, 3, 4, None])
def test_every_method_with_lambda_has_its_task_vector_scaled_by_depth(name, layer, merge):
    shape, generator = (6, 7), torch.Generator().manual_seed(0)
    base, *deltas = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    models = {f"m{i}": {"weight": 1.0} for i in range(2)}
    plain = merge(Setting(name, {}, models), base, deltas, seeds=(1, 2))
    setting = decoded(name, 5, 2, alpha=0.3, beta=0.8).setting(place(layer))
    merged = merge(setting, base, deltas, seeds=(1, 2))
    scale = 0.3 if layer is None else 0.3 + 0.8 * layer / 4
    torch.testing.assert_close(merged - base, scale * (plain - base), rtol=1e-5, atol=1e-5)
