"""Random recipes of ours: mergekit 0.1.5 makes our merger's weights of the file that we export, by class."""

from __future__ import annotations

import pytest
import torch

from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan, TensorOp
from tests.parity.compare import COUNTS, at_the_cut, beyond_rounding, checked_form
from tests.parity.conftest import RECIPES, World
from tests.parity.files import METHODS, RANDOM, has_bits
from tests.parity.recipes import DrawnRecipe
from tests.parity.sce import with_their_choice


def bits(op: TensorOp, family: str) -> bool:
    """Whether mergekit has our bits: the base's own, or those of a method without adapters that has them."""
    return not op.setting.models or (has_bits(op.setting.method, family) and "lora" not in op.setting.models)


@pytest.mark.parametrize("name", RECIPES)
def test_an_exported_recipe_gives_our_weights(world: World, name: str):
    case = world.cases[f"recipe/{name}"]
    assert isinstance(case.drawn, DrawnRecipe)
    assert case.refused == ""
    sources = world.home.sources(case.family)
    plan = MergePlan.compile(case.drawn.recipe, sources.layout())
    ours = dict(Merger(sources).materialize(plan))
    theirs = checked_form(case.theirs, ours)
    wrong: dict[str, int] = {}
    for op in plan.ops:
        one, other = ours[op.tensor], theirs[op.tensor]
        if op.setting.method in RANDOM and drops(op):
            continue  # other masks, as the file says: test_files replays mergekit's
        if bits(op, case.family):
            differ, unclear = one != other, torch.zeros_like(one, dtype=torch.bool)
            COUNTS["recipes, bit-equal"] += one.numel()
        else:
            if op.setting.method == "sce":
                chosen = with_their_choice(sources, op.tensor, op.setting, other)
                one = one if chosen is None else chosen[0]
                COUNTS["sce, entries of equal variance at a cut"] += 0 if chosen is None else chosen[1]
            differ, unclear = beyond_rounding(other, one), at_the_cut(sources, op.tensor, op.setting)
            COUNTS["recipes, equal to rounding"] += one.numel()
            COUNTS["recipes, differing at a cut"] += int((differ & unclear).sum())
        if (differ & ~unclear).any():
            wrong[f"{op.tensor}: {op.setting}"] = int((differ & ~unclear).sum())
    assert wrong == {}, case.text


def drops(op: TensorOp) -> bool:
    return any(values["density"] < 1.0 for values in op.setting.models.values())


def test_files_with_random_masks_say_so_and_no_others_do(world: World):
    for name, case in world.cases.items():
        if name.startswith("recipe/"):
            random = any(s.method in RANDOM for s in case.drawn.recipe.cells.values())
            assert ("Random masks" in case.text) == random


def test_every_method_of_mergekit_is_drawn():
    assert set(METHODS) == {spec.mergekit for spec in SPECS.values() if spec.mergekit is not None}
