"""Plans: what a recipe means per tensor, and which recipes have no plan."""

from __future__ import annotations

import pytest

from evomerge.errors import RecipeError
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.layout import Layout

LAYOUT = Layout(
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    ]
)
MLP = Cell(0, "mlp")
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def recipe(setting: Setting, cell: Cell = MLP, seed: int = 0) -> Recipe:
    return Recipe("base", ("math", "code"), {cell: setting}, seed)


def dare(density: float = 0.5) -> Setting:
    return Setting("dare_linear", {}, {"math": {"weight": 1.0, "density": density}})


def test_tensors_keep_the_order_of_the_checkpoint():
    assert tuple(op.tensor for op in MergePlan.compile(recipe(dare()), LAYOUT).ops) == LAYOUT.tensors


def test_settings_are_completed_with_defaults():
    plan = MergePlan.compile(recipe(Setting("ties", {}, {"math": {"weight": 1.0}})), LAYOUT)
    op = next(op for op in plan.ops if op.tensor == UP)
    assert op.setting.parameters == {"lambda": 1.0, "normalize": True, "rescale": False}
    assert op.setting.models["math"] == {"weight": 1.0, "density": 1.0}


def test_cells_without_a_setting_keep_the_base():
    plan = MergePlan.compile(recipe(dare()), LAYOUT)
    assert [op.tensor for op in plan.ops if op.setting.models] == [UP, DOWN]


def test_random_methods_have_the_recipes_seed_of_each_model_and_tensor():
    made = recipe(dare(), seed=5)
    seeds = {op.tensor: op.seeds for op in MergePlan.compile(made, LAYOUT).ops}
    assert seeds[UP] == (made.seed_for("math", UP),)
    assert seeds[UP] != seeds[DOWN]
    assert seeds["model.norm.weight"] == ()


def differing(one: MergePlan, other: MergePlan) -> set[str]:
    return {a.tensor for a, b in zip(one.ops, other.ops, strict=True) if a.digest != b.digest}


def test_only_tensors_whose_operation_differs_have_another_digest():
    one, other = (MergePlan.compile(recipe(dare(density)), LAYOUT) for density in (0.5, 0.6))
    assert differing(one, other) == {UP, DOWN}
    assert differing(one, MergePlan.compile(recipe(dare()), LAYOUT)) == set()


def test_another_seed_changes_random_tensors_only():
    one, other = (MergePlan.compile(recipe(dare(), seed=seed), LAYOUT) for seed in (0, 1))
    assert differing(one, other) == {UP, DOWN}
    plain = Setting("task_arithmetic", {}, {"math": {"weight": 1.0}})
    one, other = (MergePlan.compile(recipe(plain, seed=seed), LAYOUT) for seed in (0, 1))
    assert differing(one, other) == set()


def test_the_order_of_the_models_is_part_of_an_operation():
    first, second = ({"math": {}, "code": {}}, {"code": {}, "math": {}})
    one, other = (MergePlan.compile(recipe(Setting("slerp", {"t": 0.2}, m)), LAYOUT) for m in (first, second))
    assert differing(one, other) == {UP, DOWN}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting("tise", {}, {}), r"layers\[0\].mlp: `tise` is not a merge method \(did you mean `ties`\?\)"),
        (
            Setting("ties", {}, {"maths": {"weight": 1.0}}),
            r"layers\[0\].mlp: `maths` is not.*did you mean `math`",
        ),
        (
            Setting("ties", {}, {"math": {"weight": 1.0, "density": 2.0}}),
            r"layers\[0\].mlp, model `math`: density",
        ),
        (Setting("ties", {}, {"math": {"wieght": 1.0}}), r"no parameter `wieght`"),
        (Setting("ties", {}, {"base": {"weight": 1.0}}), r"layers\[0\].mlp: `base` is the base model"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_cell(setting, message):
    with pytest.raises(RecipeError, match=message):
        MergePlan.compile(recipe(setting), LAYOUT)


def test_linear_may_average_with_the_base():
    setting = Setting("linear", {}, {"base": {"weight": 1.0}, "math": {"weight": 1.0}})
    assert MergePlan.compile(recipe(setting), LAYOUT).ops[2].setting.models == setting.models


def test_a_cell_that_the_model_has_not_got_is_refused():
    with pytest.raises(
        RecipeError, match=r"layers\[9\].mlp has a setting, but no tensor of base model `base`"
    ):
        MergePlan.compile(recipe(dare(), Cell(9, "mlp")), LAYOUT)
