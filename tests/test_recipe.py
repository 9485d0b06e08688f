"""Recipes: one digest for one meaning, and a YAML form that keeps it."""

from __future__ import annotations

import pytest
import yaml

from evomerge.errors import RecipeError
from evomerge.recipe import BASE_COPY, Cell, MethodSpec, ParameterSpec, Recipe, Setting, rounded

HALF = Setting("task_arithmetic", {"lambda": 1.0}, {"math": {"weight": 0.5}, "code": {"weight": 0.25}})
OTHER = Setting("ties", {"lambda": 1.0}, {"math": {"weight": 1.0, "density": 0.2}})


def recipe(cells: dict[Cell, Setting], **fields: object) -> Recipe:
    return Recipe("base", ("math", "code"), cells, **fields)  # type: ignore[arg-type]


def test_the_order_in_which_cells_are_listed_does_not_change_the_digest():
    one = recipe({Cell(0, "mlp"): HALF, Cell(1, "mlp"): OTHER})
    two = recipe({Cell(1, "mlp"): OTHER, Cell(0, "mlp"): HALF})
    assert one.digest == two.digest


def test_a_cell_that_keeps_the_base_is_the_same_as_no_cell():
    assert recipe({Cell(0, "mlp"): BASE_COPY}).digest == recipe({}).digest


@pytest.mark.parametrize(
    "other",
    [
        recipe({Cell(0, "mlp"): OTHER}),
        recipe({Cell(1, "mlp"): HALF}),
        recipe({Cell(0, "mlp"): HALF}, seed=1),
        recipe({Cell(0, "mlp"): HALF}, modules={"head": ("lm_head",)}),
    ],
)
def test_different_recipes_have_different_digests(other: Recipe):
    assert recipe({Cell(0, "mlp"): HALF}).digest != other.digest


def test_yaml_keeps_the_digest_and_the_order_of_models():
    whole = recipe(
        {
            **{Cell(layer, module): HALF for layer in range(3) for module in ("mlp", "attention")},
            Cell(3, "mlp"): OTHER,
            Cell(None, "embedding"): HALF,
        },
        seed=7,
    )
    again = Recipe.from_json(yaml.safe_load(yaml.safe_dump(whole.as_json(), sort_keys=False)))
    assert again == whole
    assert again.digest == whole.digest
    assert list(again.cells[Cell(0, "mlp")].models) == ["math", "code"]


def test_equal_neighbours_are_written_as_one_group():
    cells = {Cell(layer, module): HALF for layer in range(4) for module in ("mlp", "attention")}
    groups = recipe(cells).as_json()["groups"]
    assert [(g["layers"], g["modules"]) for g in groups] == [([0, 4], ["attention", "mlp"])]


def test_seeds_of_masks_depend_on_seed_model_and_tensor_alone():
    seeds = {
        recipe({}, seed=seed).seed_for(model, tensor)
        for seed in (0, 1)
        for model in ("math", "code")
        for tensor in ("a", "b")
    }
    assert len(seeds) == 8
    assert recipe({}).seed_for("math", "a") == recipe({Cell(0, "mlp"): HALF}).seed_for("math", "a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "`evomerge_recipe` is None"),
        ({"evomerge_recipe": 99}, "`evomerge_recipe` is 99"),
        ({"evomerge_recipe": 1, "base_model": "base"}, "not a recipe: KeyError 'groups'"),
        ({"evomerge_recipe": 1, "base_model": "base", "models": [], "groups": [3]}, "not a recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(data: dict[str, object], message: str):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(data, "best.yaml")


def test_rounding_never_gives_minus_zero():
    assert str(rounded(-1e-9)) == "0.0"


SPEC = MethodSpec(
    name="sum",
    shared={"normalize": ParameterSpec(kind="bool", default=True)},
    per_model={
        "weight": ParameterSpec(),
        "density": ParameterSpec(0, 1, 1.0, low_open=True, doc="the fraction kept"),
    },
    canonical=lambda setting: setting,
    min_models=1,
    max_models=2,
)


def test_defaults_are_filled_in():
    done = SPEC.complete(Setting("sum", {}, {"math": {"weight": 1}}), "cell")
    assert done.parameters == {"normalize": True}
    assert done.models == {"math": {"weight": 1, "density": 1.0}}


@pytest.mark.parametrize(
    ("shared", "values", "message"),
    [
        ({}, {"weight": 1, "density": 1.3}, r"density is 1.3.*fraction kept.*\(0, 1\]"),
        ({}, {"weight": 1, "density": 0.0}, r"density is 0.0.*\(0, 1\]"),
        ({}, {"weight": float("nan")}, "weight is nan, but it must be a finite number"),
        ({}, {"weight": True}, "weight is True, but it must be a finite number"),
        ({}, {}, "sum needs `weight`"),
        ({}, {"weight": 1, "wieght": 1}, "no parameter `wieght`; it has: density, weight"),
        ({"normalize": 1.0}, {"weight": 1}, "normalize is 1.0.*true or false"),
    ],
)
def test_a_setting_that_the_method_refuses_names_the_parameter(
    shared: dict[str, float], values: dict[str, float], message: str
):
    with pytest.raises(RecipeError, match=message):
        SPEC.complete(Setting("sum", shared, {"m": values}), "layers[3].mlp")


LIMITED = MethodSpec(
    name="thin",
    shared={},
    per_model={
        "density": ParameterSpec(0, 1, 1.0),
        "epsilon": ParameterSpec(
            0, 1, 0.3, doc="a spread", below=lambda values: 1 - values["density"], below_doc="what is dropped"
        ),
    },
    canonical=lambda setting: setting,
)


@pytest.mark.parametrize("values", [{"density": 0.8}, {"density": 0.7}, {"density": 0.5, "epsilon": 0.6}])
def test_a_limit_set_by_another_value_is_checked_with_defaults_filled_in(values: dict[str, float]):
    message = (
        r"layers\[3\]\.mlp, model `m`: epsilon is 0\.\d, but it is a spread and must be below 0\.\d, what"
    )
    with pytest.raises(RecipeError, match=message):
        LIMITED.complete(Setting("thin", {}, {"m": values}), "layers[3].mlp")


def test_the_largest_value_beside_another_is_allowed_and_one_more_step_is_not():
    spec = LIMITED.per_model["epsilon"]
    most = spec.most({"density": 0.7})
    assert most == 0.299999
    LIMITED.complete(Setting("thin", {}, {"m": {"density": 0.7, "epsilon": most}}), "cell")
    with pytest.raises(RecipeError, match=r"must be below 0\.3"):
        LIMITED.complete(Setting("thin", {}, {"m": {"density": 0.7, "epsilon": 0.3}}), "cell")


def test_too_few_models_are_refused():
    with pytest.raises(RecipeError, match="sum has 0 models, but it merges 1 to 2"):
        SPEC.complete(Setting("sum"), "layers[3].mlp")
