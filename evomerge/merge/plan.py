"""A recipe applied to a layout: one checked operation per tensor, and nothing else to decide.

Imports: `evomerge.recipe`, `evomerge.sources.layout`, `evomerge.merge.methods` (specs); never torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from evomerge.errors import RecipeError
from evomerge.merge.methods import METHODS, SPECS
from evomerge.recipe import Cell, MethodSpec, Recipe, Setting
from evomerge.sources.layout import Layout


@dataclass(frozen=True)
class TensorOp:
    """How one tensor is merged; equal operations over the same sources give the same tensor.

    Attributes:
        tensor: its name in the base checkpoint.
        cell: where it belongs, for messages.
        setting: complete: every parameter has a value.
        seeds: one per model of the setting, empty when the method is not random.
    """

    tensor: str
    cell: Cell
    setting: Setting
    seeds: tuple[int, ...] = ()

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of tensor, setting and seeds."""
        data = [self.tensor, self.setting.as_json(), self.seeds]
        # not sorted: the models' order is part of the operation; `as_json` sorts the rest
        return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class MergePlan:
    """The operations of one recipe, in the order of the base checkpoint.

    Attributes:
        base: name of the base model.
        ops: one per tensor of the layout.
    """

    base: str
    ops: tuple[TensorOp, ...]

    @classmethod
    def compile(cls, recipe: Recipe, layout: Layout, specs: Mapping[str, MethodSpec] = SPECS) -> MergePlan:
        """Check `recipe` against its methods and write it out per tensor.

        Raises:
            RecipeError: an unknown method, model or parameter, a value out of its range, a wrong number of
                models, or a cell that the base model has not got; the message names the cell.
        """
        for cell in recipe.cells:
            if cell not in layout.by_cell:
                raise RecipeError(
                    f"recipe: {cell} has a setting, but no tensor of base model `{recipe.base}` belongs to it"
                    f"{_nearest(str(cell), map(str, layout.by_cell))}; remove it from the recipe's groups"
                )
        settings = {cell: _checked(recipe, cell, specs) for cell in layout.by_cell}
        cells = {tensor: cell for cell, tensors in layout.by_cell.items() for tensor in tensors}
        ops = []
        for tensor in layout.tensors:
            setting = settings[cells[tensor]]
            random = specs[setting.method].random
            seeds = tuple(recipe.seed_for(model, tensor) for model in setting.models) if random else ()
            ops.append(TensorOp(tensor, cells[tensor], setting, seeds))
        return cls(recipe.base, tuple(ops))


def _checked(recipe: Recipe, cell: Cell, specs: Mapping[str, MethodSpec]) -> Setting:
    setting = recipe.setting(cell)
    if setting.method not in specs:
        raise RecipeError(
            f"{cell}: `{setting.method}` is not a merge method{_nearest(setting.method, specs)}; "
            f"the methods are: {', '.join(sorted(specs))}"
        )
    takes_base = setting.method in METHODS and METHODS[setting.method].takes_base
    allowed = (recipe.base, *recipe.models) if takes_base else recipe.models
    for model in setting.models:
        if model == recipe.base and not takes_base:
            raise RecipeError(
                f"{cell}: `{model}` is the base model, but {setting.method} merges differences from it; "
                "remove it from the cell's models"
            )
        if model not in allowed:
            raise RecipeError(
                f"{cell}: `{model}` is not a model of the recipe{_nearest(model, allowed)}; "
                f"its models are: {', '.join(recipe.models)}"
            )
    return specs[setting.method].complete(setting, str(cell))


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean `{match[0]}`?)" if match else ""
