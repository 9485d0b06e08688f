"""What a study is to do: stages, fixed recipes, optimizer, budget.

Imports: `errors`, `space`, `search.base`, `study`; never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import ConfigError
from evomerge.search.base import CategoricalParameter
from evomerge.space import BoundSpace
from evomerge.study.budget import Budget
from evomerge.study.fixed import FixedRecipe
from evomerge.study.trial import FIXED


@dataclass(frozen=True)
class Stage:
    """One stage of the search, from coarse to fine.

    Attributes:
        name: unique within the run.
        space: what it searches.
        sigma: standard deviation of its first proposals, in units of each parameter's range.
        until: share of the search's budget at which it ends, in (0, 1]; the last stage has 1.
        slot: stages of one slot are alternatives, of which one is searched: the first whose space can say
            the incumbent exactly, or the first of all. None: the stage has no alternative.
    """

    name: str
    space: BoundSpace
    sigma: float
    until: float
    slot: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a study does, apart from its engine and its storage.

    Attributes:
        fixed: recipes to score before the search.
        stages: at least one.
        optimizer: name of the optimizer, with its `population_size` and `options`.
        budget: limits of the run. The fixed recipes count towards them but are scored in any case: where
            they use all of it, no search follows and the run ends with the best of them.
        seed: root of all randomness of the search.
        screen: items per task on which fixed recipes are first scored; None scores all of them in full.
        promote: how many of the screened recipes are then scored on every calibration item.
        reserve: seconds needed after the search; called with the seconds that an item took so far.

    Raises:
        ConfigError: two stages have one name, or one categorical parameter with different choices.
    """

    fixed: tuple[FixedRecipe, ...]
    stages: tuple[Stage, ...]
    optimizer: str
    budget: Budget
    seed: int = 0
    population_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    screen: int | None = None
    promote: int = 5
    reserve: Callable[[float], float] = lambda seconds_per_item: 0.0

    def __post_init__(self) -> None:
        names = [FIXED, *(stage.name for stage in self.stages)]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two stages are named `{name}`; give each stage its own name")
        seen: dict[str, tuple[str, tuple[str, ...]]] = {}
        for stage in self.stages:
            for p in stage.space.parameters:
                if isinstance(p, CategoricalParameter):
                    first, choices = seen.setdefault(p.name, (stage.name, p.choices))
                    if choices != p.choices:  # an Optuna study allows one set of choices per name
                        raise ConfigError(
                            f"parameter `{p.name}` has the choices {', '.join(choices)} in stage `{first}` "
                            f"and {', '.join(p.choices)} in stage `{stage.name}`; give both stages the same "
                            "`methods`"
                        )
