"""Random recipes of evomerge, drawn by hypothesis: up to three settings shared out over the cells."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from evomerge.recipe import Cell, Recipe, Setting
from tests.parity.families import EXPERTS, FAMILIES
from tests.parity.files import METHODS, NOT_NEOX, PLAIN

SOURCES = (*EXPERTS, "lora")
MODULES = ("attention", "mlp", "norm")


class DrawnRecipe(NamedTuple):
    family: str
    recipe: Recipe


@st.composite
def setting(draw: st.DrawFn, method: str, adapters: bool) -> Any:
    """A strategy for settings of one method over fixed models: each cell draws its own values."""
    spec = METHODS[method]
    names = draw(st.permutations(SOURCES))
    names = [name for name in names if name != "lora" or (adapters and method not in PLAIN)]
    names = names[: draw(st.integers(*spec.models))]
    if spec.base == "input" and draw(st.booleans()):
        names.append("base")
    if "weight" in spec.own and method != "nuslerp":
        # a document has one order for all cells, the recipe's with the base in front; sums round by order
        names = [name for name in ("base", *SOURCES) if name in names]
    shared = {key: numbers for key, numbers in spec.shared.items() if key in ("t",) or draw(st.booleans())}
    if spec.base == "optional":
        shared["task_vectors"] = st.just(draw(st.booleans()))
    return st.builds(
        lambda own, common: Setting(method, common, {name: own[name] for name in names}),
        st.fixed_dictionaries({name: st.fixed_dictionaries(spec.own) for name in names}),
        st.fixed_dictionaries(shared),
    )


@st.composite
def recipe(draw: st.DrawFn, method: str) -> DrawnRecipe:
    """A recipe in which `method` and up to two more share the cells; some cells keep the base."""
    methods = [method, *draw(st.lists(st.sampled_from(sorted(METHODS)), max_size=2))]
    barred = set(methods) & set(NOT_NEOX)
    names = [name for name in sorted(FAMILIES) if not (barred and FAMILIES[name].architecture == "gpt_neox")]
    family = draw(st.sampled_from(names))
    adapters = FAMILIES[family].architecture != "gpt_neox"  # mergekit cannot merge one into it
    kinds = [draw(setting(name, adapters)) for name in methods]
    places = [Cell(i, module) for i in range(FAMILIES[family].layers) for module in MODULES]
    cells = {}
    for cell in (*places, Cell(None, "embedding"), Cell(None, "norm")):
        index = draw(st.integers(0, len(kinds)))
        if index < len(kinds):
            cells[cell] = draw(kinds[index])
    return DrawnRecipe(family, Recipe("base", SOURCES, cells))
