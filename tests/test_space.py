"""Search spaces: what they vary, what their parameters decode to, and the way from coarse to fine."""

from __future__ import annotations

import random

import pytest

from evomerge.errors import ConfigError, RecipeError
from evomerge.merge.methods import SPECS
from evomerge.recipe import Cell, Recipe
from evomerge.resources import resource_folder
from evomerge.search.base import CategoricalParameter, FloatParameter, Params
from evomerge.sources.layout import Layout
from evomerge.space import BoundSpace, Family, SearchSpace
from evomerge.yamlfile import load_yaml, validate
from tests.family import family, tensor_names

SHIPPED = sorted(path.stem for path in resource_folder("search_spaces").glob("*.yaml"))


def space(**fields: object) -> SearchSpace:
    data = {"methods": ["task_arithmetic"], "parameters": {"weight": {"low": -0.2, "high": 1.3}}, **fields}
    return validate(SearchSpace, data, "space.yaml")


def shipped(name: str) -> SearchSpace:
    path = resource_folder("search_spaces") / f"{name}.yaml"
    return validate(SearchSpace, load_yaml(path), str(path))


def draw(bound: BoundSpace, seed: int) -> Params:
    rng = random.Random(seed)
    return {
        p.name: rng.choice(p.choices) if isinstance(p, CategoricalParameter) else rng.uniform(p.low, p.high)
        for p in bound.parameters
    }


def weight(recipe: Recipe, layer: int, module: str, model: str) -> float:
    values = recipe.setting(Cell(layer, module)).models.get(model, {"weight": 0.0})
    return values["weight"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_space_decodes_what_it_asks_for(name: str):
    bound = shipped(name).bind(family(30))
    for seed in range(20):
        recipe = bound.decode(draw(bound, seed))
        assert recipe.digest == bound.decode(draw(bound, seed)).digest


def test_one_weight_per_model_is_three_parameters_for_three_models():
    bound = shipped("global").bind(family())
    assert [p.name for p in bound.parameters] == ["all.math.weight", "all.code.weight", "all.chat.weight"]


def test_blocks_by_modules_have_a_weight_per_block_module_and_model():
    bound = space(layers={"blocks": 4}, modules={"attention": ["attention"], "mlp": ["mlp"]}).bind(family())
    assert bound.dimension == 4 * 2 * 3
    assert bound.parameters[0].name == "layers0-2.attention.math.weight"


def test_parameters_that_can_change_nothing_are_left_out():
    """Experts that touch only two layers leave nothing to search in the others, or outside the layers."""
    touched = {"math": {Cell(0, "mlp"), Cell(1, "mlp")}, "code": {Cell(0, "attention")}}
    bound = space(layers={"blocks": 2}, modules="each").bind(family(4, changes=touched))
    assert [p.name for p in bound.parameters] == [
        "layers0-1.attention.code.weight",
        "layers0-1.mlp.math.weight",
    ]


def test_explicit_ranges_may_have_any_length():
    bound = space(layers={"ranges": [[0, 1], [1, 12]]}).bind(family())
    params = {p.name: 0.5 if p.name.startswith("layers0-0") else 1.0 for p in bound.parameters}
    recipe = bound.decode(params)
    assert [weight(recipe, layer, "mlp", "math") for layer in (0, 1, 11)] == [0.5, 1.0, 1.0]


def test_smooth_weights_are_linear_between_knots():
    """With knots 0, 1 and 0 the middle layer has 1 and the others lie on straight lines (LiNeS, 2 pieces)."""
    bound = space(layers={"smooth": 3}).bind(family(5, models=("math",)))
    recipe = bound.decode({f"all.knot{i}.math.weight": v for i, v in enumerate((0.0, 1.0, 0.0))})
    assert [weight(recipe, layer, "mlp", "math") for layer in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def lines(**fields: object) -> dict[str, object]:
    bounds = {"alpha": {"low": 0.0, "high": 1.0}, "beta": {"low": -0.5, "high": 1.5}}
    return {"layers": {"lines": bounds}, **fields}


def test_lines_are_two_numbers_for_the_whole_network():
    bound = shipped("lines").bind(family(30))
    assert [p.name for p in bound.parameters] == ["all.lines.alpha", "all.lines.beta"]


def test_lines_are_two_numbers_per_group_beside_weights():
    bound = space(**lines(modules={"mlp": ["mlp"]}, methods=["ties"])).bind(family(models=("math",)))
    assert [p.name for p in bound.parameters] == [
        *("rest.math.weight", "rest.lines.alpha", "rest.lines.beta"),
        *("mlp.math.weight", "mlp.lines.alpha", "mlp.lines.beta"),
    ]


def test_lines_outside_the_layers_have_alpha_alone():
    layout = family(4).layout
    everywhere = {"math": set(layout.by_cell), "code": set(layout.by_cell)}
    bound = space(**lines(methods=["ties"])).bind(family(4, changes=everywhere))
    names = [p.name for p in bound.parameters if p.name.startswith("outside")]
    assert names == ["outside.math.weight", "outside.code.weight", "outside.lines.alpha"]
    recipe = bound.decode({p.name: 0.5 for p in bound.parameters} | {"outside.lines.alpha": 0.25})
    assert recipe.setting(Cell(None, "norm")).parameters["lambda"] == 0.25
    scales = [recipe.setting(Cell(layer, "mlp")).parameters["lambda"] for layer in range(4)]
    assert scales == pytest.approx([0.5, 0.5 + 0.5 / 3, 0.5 + 1 / 3, 1.0], abs=1e-6)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "tsvm"])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed_weight", "weights"])
@pytest.mark.parametrize("seed", range(3))
def test_a_recipe_on_lines_is_found_again_on_lines(method: str, fixed: bool, seed: int):
    """`lambda` and weights share a scale, so the numbers may differ; the recipe may not, but in rounding."""
    weights = {"parameters": {}, "constants": {"weight": 1.0}} if fixed else {}
    bound = space(**lines(methods=[method], **weights)).bind(family(9))
    params = draw(bound, seed) | {"all.math.weight": 0.5, "all.code.weight": 0.25, "all.chat.weight": 0.1}
    params |= {"all.lines.alpha": 0.4, "all.lines.beta": (0.5, -0.1, 0.0)[seed]}
    recipe = bound.decode(params)
    again = bound.decode(bound.encode(recipe))
    for cell, setting in recipe.cells.items():
        other = again.setting(cell)
        assert other.parameters == pytest.approx(setting.parameters, abs=3e-6)
        assert list(other.models) == list(setting.models)
        for model, values in setting.models.items():
            assert other.models[model] == pytest.approx(values, abs=3e-6)


@pytest.mark.parametrize("coarse", ["global", "ties"])
def test_lines_begin_with_the_recipe_that_the_stage_before_ended_with(coarse: str):
    before = shipped(coarse).bind(family(30))
    dense = {"constants": {"density": 0.3}} if coarse == "ties" else {}
    after = space(**lines(methods=before.space.methods, outside="first", **dense)).bind(family(30))
    params = draw(before, 5) | {"all.lambda": 0.8, "all.density": 0.3}
    recipe = before.decode({p.name: params[p.name] for p in before.parameters})
    assert after.decode(after.encode(recipe)).digest == recipe.digest


def test_several_methods_make_the_method_a_parameter():
    bound = shipped("mixed").bind(family())
    choices = [p for p in bound.parameters if isinstance(p, CategoricalParameter)]
    assert [p.name for p in choices] == ["layers0-3.method", "layers4-7.method", "layers8-11.method"]
    params = dict(draw(bound, 0)) | {p.name: "ties" for p in choices} | {"layers0-3.method": "dare_ties"}
    recipe = bound.decode(params)
    assert recipe.setting(Cell(0, "mlp")).method == "dare_ties"
    assert recipe.setting(Cell(11, "mlp")).method == "ties"


def test_a_density_that_the_method_has_not_got_does_not_change_the_recipe():
    bound = shipped("mixed").bind(family())
    params = dict(draw(bound, 1)) | {
        p.name: "task_arithmetic" for p in bound.parameters if p.name.endswith("method")
    }
    other = params | {p.name: 0.9 for p in bound.parameters if p.name.endswith("density")}
    assert bound.decode(params).digest == bound.decode(other).digest


WIDE_DELLA = {
    "methods": ["della", "della_linear"],
    "parameters": {
        "weight": {"low": 0.0, "high": 1.0},
        "density": {"low": 0.01, "high": 1.0},
        "epsilon": {"low": 0.0, "high": 0.5},
    },
}


@pytest.mark.parametrize("epsilon", ["searched", "constant", "default"])
def test_a_space_proposes_no_value_above_the_limit_that_another_sets(epsilon: str):
    fields = dict(WIDE_DELLA, parameters=dict(WIDE_DELLA["parameters"]), constants={})
    if epsilon != "searched":
        del fields["parameters"]["epsilon"]
    if epsilon == "constant":
        fields["constants"] = {"epsilon": 0.4}
    bound = space(**fields).bind(family())
    for seed in range(200):
        setting = bound.decode(draw(bound, seed)).setting(Cell(0, "mlp"))
        for values in setting.models.values():
            density, spread = values.get("density", 1.0), values.get("epsilon", 0.0)
            assert density == 1.0 or 0.0 < density - spread <= density + spread < 1.0


def test_a_value_below_its_limit_is_taken_as_it_is():
    bound = space(**dict(WIDE_DELLA, methods=["della"])).bind(family())
    params = {p.name: 0.5 for p in bound.parameters} | {"all.density": 0.8, "all.epsilon": 0.15}
    assert bound.decode(params).setting(Cell(0, "mlp")).models["math"]["epsilon"] == 0.15
    assert bound.encode(bound.decode(params))["all.epsilon"] == 0.15


def test_scaled_ties_weights_are_the_same_recipe():
    """Only ratios of TIES weights matter (methods.md A.6.2), so 0.2 : 0.4 : 0.4 equals 0.4 : 0.8 : 0.8."""
    bound = space(methods=["ties"]).bind(family())
    low = bound.decode({"all.math.weight": 0.2, "all.code.weight": 0.4, "all.chat.weight": 0.4})
    high = bound.decode({"all.math.weight": 0.4, "all.code.weight": 0.8, "all.chat.weight": 0.8})
    assert low.digest == high.digest


def test_a_weight_of_zero_is_the_same_as_leaving_the_model_out():
    bound = space().bind(family())
    zero = bound.decode({"all.math.weight": 0.5, "all.code.weight": 0.0, "all.chat.weight": 0.0})
    alone = space().bind(family(models=("math",))).decode({"all.math.weight": 0.5})
    assert zero.cells == alone.cells


def test_slerp_takes_the_two_heaviest_models_and_their_ratio():
    bound = space(methods=["slerp"], parameters={"weight": {"low": 0.0, "high": 1.0}}).bind(family())
    params = {"all.math.weight": 0.1, "all.code.weight": 0.9, "all.chat.weight": 0.3}
    setting = bound.decode(params).setting(Cell(0, "mlp"))
    assert list(setting.models) == ["code", "chat"]
    assert setting.parameters["t"] == pytest.approx(0.25)


def test_slerp_without_weights_is_infeasible():
    bound = space(methods=["slerp"], parameters={"weight": {"low": 0.0, "high": 1.0}}).bind(family())
    with pytest.raises(RecipeError, match="slerp needs two models"):
        bound.decode({p.name: 0.0 for p in bound.parameters})


@pytest.mark.parametrize(
    ("method", "models"),
    [
        ("nuslerp", ["math", "code"]),
        ("nearswap", ["code"]),
        ("multislerp", ["math", "code", "chat"]),
        ("karcher", ["math", "code"]),  # without weights of its own: those above 0 take part
    ],
)
def test_the_models_that_take_part_in_a_method(method: str, models: list[str]):
    bound = space(methods=[method], constants={"t": 0.01} if method == "nearswap" else {}).bind(family())
    params = {"all.math.weight": 0.4, "all.code.weight": 0.9, "all.chat.weight": -0.1}
    assert list(bound.decode(params).setting(Cell(0, "mlp")).models) == models


def test_models_of_a_method_without_weights_are_read_back_as_taking_part():
    bound = space(methods=["karcher"]).bind(family())
    params = {"all.math.weight": 0.4, "all.code.weight": 0.9, "all.chat.weight": -0.1}
    assert bound.decode(bound.encode(bound.decode(params))) == bound.decode(params)


@pytest.mark.parametrize(
    ("coarse", "fine"),
    [("global", "modules"), ("modules", "blocks"), ("ties", "ties_modules"), ("ties_modules", "ties_blocks")],
)
@pytest.mark.parametrize("seed", range(10))
def test_a_stage_begins_with_the_very_weights_that_the_stage_before_ended_with(
    coarse: str, fine: str, seed: int
):
    before = shipped(coarse).bind(family(30))
    after = shipped(fine).bind(family(30))
    recipe = before.decode(draw(before, seed))
    assert after.decode(after.encode(recipe)).digest == recipe.digest


@pytest.mark.parametrize("name", ["global", "modules", "blocks", "smooth"])
def test_encoding_is_the_inverse_of_decoding(name: str):
    bound = shipped(name).bind(family(31))
    params = draw(bound, 3)
    encoded = bound.encode(bound.decode(params))
    assert encoded == pytest.approx({key: round(float(value), 6) for key, value in params.items()}, abs=1e-6)


def test_encoded_values_stay_inside_the_bounds():
    wide = space(parameters={"weight": {"low": 0.0, "high": 2.0}}).bind(family())
    narrow = space(parameters={"weight": {"low": 0.0, "high": 1.0}}).bind(family())
    recipe = wide.decode({p.name: 2.0 for p in wide.parameters})
    assert set(narrow.encode(recipe).values()) == {1.0}


def test_a_recipe_with_random_masks_has_the_seed():
    bound = space(methods=["dare_linear"], constants={"density": 0.5}).bind(family(seed=9))
    assert bound.decode(draw(bound, 0)).seed == 9


def test_a_recipe_without_random_masks_has_one_digest_whatever_the_seed():
    one, other = (space().bind(family(seed=seed)) for seed in (1, 2))
    assert one.decode(draw(one, 0)).digest == other.decode(draw(one, 0)).digest


def test_module_patterns_travel_with_the_recipe():
    layout = Layout(tensor_names(12), {"query": ["q_proj"]})
    changes = {"math": {cell for cell in layout.by_cell if cell.module == "query"}}
    bound = space().bind(Family(layout, changes, SPECS))
    assert bound.decode(draw(bound, 0)).modules == {"query": ("q_proj",)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ["task_arithmetics"]}, "names `task_arithmetics`, which is no merge method"),
        ({"layers": {"blocks": 13}}, "`layers.blocks` is 13, but the model has 12 layers"),
        ({"layers": {"ranges": [[0, 4], [5, 12]]}}, r"has \[5, 12\) where a range must begin at layer 4"),
        ({"layers": {"ranges": [[0, 4]]}}, "ends at layer 4, but the model has 12 layers"),
        ({"modules": {"a": ["atention"]}}, "names `atention`, which is no module"),
        ({"modules": {"a": ["mlp"], "b": ["mlp"]}}, "`mlp` is in the groups `a` and `b`"),
        ({"parameters": {"density": {"low": 0.1, "high": 1.0}}}, "belongs to none of the methods"),
        (
            {"methods": ["ties"], "parameters": {"density": {"low": 0.1, "high": 1.3}}},
            r"density is 1.3, but it is the fraction.*must be in \(0, 1\]; change `low`/`high` of `density`",
        ),
        ({"methods": ["ties"], "parameters": {"density": {"low": 0.1, "high": 1.0}}}, "weight` is missing"),
        ({"parameters": {}, "constants": {"weight": 1.0}}, "weight` is missing"),
        ({"methods": ["karcher"], "parameters": {}}, "`karcher` without `parameters` is one recipe"),
        ({"methods": ["karcher", "slerp"], "parameters": {}}, "weight` is missing"),
        (
            {"methods": ["fisher"], "parameters": {"weight": {"low": 0, "high": 1}}},
            "fisher needs the `fisher` statistics of every model, but model `math`",
        ),
        ({"methods": ["ota"], "parameters": {}}, "model `math` has none; save Adam's `exp_avg_sq`"),
        (lines(parameters={}), r"weight is missing.*set `constants.weight`"),
        (lines(methods=["linear"]), "scales `lambda`, which `linear` has not; use `layers.smooth`, or.*ties"),
        (lines(constants={"lambda": 0.5}), "`constants.lambda` and `layers.lines` both set `lambda`"),
        (
            lines(parameters={"weight": {"low": 0, "high": 1}, "lambda": {"low": 0, "high": 1}}),
            "`parameters.lambda` and `layers.lines` both set `lambda`; remove",
        ),
    ],
)
def test_a_space_that_does_not_fit_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        space(**fields).bind(family(), "spaces/mine.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": ["ties"]}, "unknown key `method`; did you mean `methods`"),
        ({"parameters": {"weight": {"low": 1.0, "high": 1.0}}}, "low must be below high"),
        ({"layers": {"blocks": 0}}, "layers.blocks"),
        ({"layers": {"smooth": 1}}, "layers.smooth"),
    ],
)
def test_a_space_file_with_a_mistake_names_the_key(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        space(**fields)


def test_models_that_change_nothing_leave_nothing_to_search():
    with pytest.raises(ConfigError, match="nothing to search"):
        space().bind(family(changes={"math": set()}))


@pytest.mark.parametrize(
    ("method", "free"), [("sce", "select_topk"), ("ram", "epsilon"), ("opcm_per_tensor", "alpha")]
)
def test_a_method_without_weights_needs_none_and_merges_all_models(method: str, free: str):
    bound = space(methods=[method], parameters={free: {"low": 0.2, "high": 0.9}}).bind(family())
    assert [p.name for p in bound.parameters] == [f"all.{free}"]
    setting = bound.decode({f"all.{free}": 0.5}).setting(Cell(0, "mlp"))
    assert (setting.method, list(setting.models)) == (method, ["math", "code", "chat"])


def test_methods_without_parameters_make_a_search_of_the_method_alone():
    bound = space(methods=["karcher", "model_stock"], parameters={}).bind(family())
    assert bound.parameters == (CategoricalParameter("all.method", ("karcher", "model_stock")),)
    assert len(bound.decode({"all.method": "model_stock"}).setting(Cell(0, "mlp")).models) == 3


def test_a_recipe_of_a_space_without_weights_is_found_again():
    bound = space(methods=["sce"], parameters={"select_topk": {"low": 0.2, "high": 0.9}}).bind(family())
    recipe = bound.decode({"all.select_topk": 0.35})
    assert bound.encode(recipe) == {"all.select_topk": 0.35}


def test_lines_of_a_method_without_weights_are_alpha_and_beta_alone():
    bound = space(**lines(methods=["opcm_per_tensor"], parameters={})).bind(family(5))
    assert [p.name for p in bound.parameters] == ["all.lines.alpha", "all.lines.beta"]
    recipe = bound.decode({"all.lines.alpha": 0.5, "all.lines.beta": 0.4})
    assert recipe.setting(Cell(4, "mlp")).parameters["lambda"] == 0.9
    assert bound.decode(bound.encode(recipe)) == recipe


def test_a_method_that_needs_statistics_is_searched_when_every_model_has_them():
    kinds = dict.fromkeys(("math", "code", "chat"), ("fisher",))
    averages = space(methods=["fisher"], parameters={"weight": {"low": 0.0, "high": 1.0}})
    assert averages.bind(family(statistics=kinds)).dimension == 3


def test_bounds_of_parameters_are_those_of_the_file():
    bound = space().bind(family())
    assert bound.parameters[0] == FloatParameter("all.math.weight", -0.2, 1.3)
