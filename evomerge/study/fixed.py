"""The fixed recipes: what one would try without a search. Baselines of the report, warm start of the search.

Imports: `recipe`, `space`; never torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from evomerge.recipe import Recipe, Setting
from evomerge.space import Family

MOST_SOURCES = 8  # above this, pairs and leave-one-out would outgrow a night
TIES_DENSITY = 0.2  # Yadav et al. 2023, arXiv:2306.01708: keep the top 20 %, lambda 1

Kind = Literal["base", "source", "fixed"]


@dataclass(frozen=True)
class FixedRecipe:
    """A named recipe that needs no search; `kind` says whether it is the base, a source alone or a merge."""

    label: str
    kind: Kind
    recipe: Recipe


def fixed_recipes(
    family: Family, *, scales: Sequence[float], subset_scales: Sequence[float]
) -> tuple[FixedRecipe, ...]:
    """The base, every source alone, then merges without a search; equal recipes appear once.

    Args:
        family: what is merged.
        scales: common weights of task arithmetic over all models.
        subset_scales: common weights of every pair and every leave-one-out set (up to
            `MOST_SOURCES` models; with more, these sets are left out).
    """
    seen: set[str] = set()
    result: list[FixedRecipe] = []
    for label, kind, recipe in _all(family, scales, subset_scales):
        if recipe.digest not in seen:
            seen.add(recipe.digest)
            result.append(FixedRecipe(label, kind, recipe))
    return tuple(result)


def _all(
    family: Family, scales: Sequence[float], subset_scales: Sequence[float]
) -> Iterator[tuple[str, Kind, Recipe]]:
    models = family.models
    yield family.base, "base", family.recipe({})
    for model in models:
        yield model, "source", _everywhere(family, "task_arithmetic", {model: {"weight": 1.0}})
    if len(models) < 2:
        return
    uniform = {model: {"weight": 1.0 / len(models)} for model in models}
    yield "uniform average", "fixed", _everywhere(family, "linear", uniform)
    for scale in scales:
        weights = {model: {"weight": scale} for model in models}
        yield f"task arithmetic {scale:g}", "fixed", _everywhere(family, "task_arithmetic", weights)
    ties = {model: {"weight": 1.0, "density": TIES_DENSITY} for model in models}
    yield f"ties {TIES_DENSITY:g}", "fixed", _everywhere(family, "ties", ties)
    if len(models) > MOST_SOURCES:
        return
    subsets: list[tuple[str, ...]] = list(combinations(models, 2))
    if len(models) > 3:
        subsets += list(combinations(models, len(models) - 1))
    for subset in subsets:
        for scale in subset_scales:
            weights = {model: {"weight": scale} for model in subset}
            label = f"{'+'.join(subset)} {scale:g}"
            yield label, "fixed", _everywhere(family, "task_arithmetic", weights)


def _everywhere(family: Family, method: str, models: Mapping[str, Mapping[str, float]]) -> Recipe:
    setting = Setting(method, {}, models)
    return family.recipe(dict.fromkeys(family.layout.by_cell, setting))
