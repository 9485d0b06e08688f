"""A study without models: a family of names, a fitness that is a function of weights, a fake engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge.engine.base import GenerateRequest, LikelihoodRequest
from evomerge.engine.fake import FakeEngine
from evomerge.evaluate.records import ItemStore
from evomerge.evaluate.task import Suite
from evomerge.recipe import Recipe
from evomerge.space import BoundSpace, SearchSpace
from evomerge.study.budget import Budget
from evomerge.study.fixed import fixed_recipes
from evomerge.study.plan import Plan, Stage
from evomerge.study.scoring import Scorebook
from evomerge.study.storage import TrialLog
from evomerge.study.study import Study
from evomerge.study.trial import FIXED, Trial
from tests.family import family

TIMES = ("merge_seconds", "evaluate_seconds", "elapsed")
SPLITS = ("calibration", "selection", "held_out")
FAMILY = family(layers=2, models=("math", "code"))
FIXED_RECIPES = fixed_recipes(FAMILY, scales=(0.5, 1.0), subset_scales=())

Fitness = Callable[[Recipe, str], float]  # recipe, prompt -> value of the item


def weights(recipe: Recipe) -> dict[str, float]:
    """Mean weight of every model over the recipe's cells."""
    cells = list(recipe.cells.values())
    return {
        model: sum(setting.models.get(model, {}).get("weight", 0.0) for setting in cells) / max(1, len(cells))
        for model in recipe.models
    }


def bowl(recipe: Recipe, prompt: str) -> float:
    """Largest, 0, at math 0.3 and code 0.8."""
    found = weights(recipe)
    return -((found["math"] - 0.3) ** 2) - (found["code"] - 0.8) ** 2


def write_suite(folder: Path, tasks: Mapping[str, str] | None = None, *, n: int = 3, **top: Any) -> Path:
    """`suite.yaml` with `n` items per task and split; tasks map to scorers, by default one `nll` task."""
    sections = {}
    for name, scorer in (tasks or {"words": "nll"}).items():
        rows = [
            {"id": f"{split}-{i}", "split": split, "question": f"{name} {split} {i}", "answer": "x"}
            for split in SPLITS
            for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sections[name] = {"data": f"{name}.jsonl", "prompt": "{{ question }}", "scorer": scorer}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": sections, **top}))
    return path


def engine(fitness: Fitness = bowl, **fields: Any) -> FakeEngine:
    """An engine whose items have the value `fitness`; with the `exact` scorer, 1 where it is above 0.5."""

    def answer(recipe: Recipe, request: GenerateRequest) -> str:
        return "x" if fitness(recipe, request.prompt) > 0.5 else "y"

    def likelihood(recipe: Recipe, request: LikelihoodRequest) -> float:
        return fitness(recipe, request.prompt) * math.log(2)  # nll divides by ln 2 and the answer's one byte

    return FakeEngine(answer, likelihood, **fields)


def space(**fields: Any) -> BoundSpace:
    """Task arithmetic, one weight per model, unless `fields` says else."""
    given: dict[str, Any] = {
        "outside": "first",
        "methods": ["task_arithmetic"],
        "parameters": {"weight": {"low": -0.2, "high": 1.3}},
    }
    return SearchSpace(**(given | fields)).bind(FAMILY)


def plan(trials: int | None = None, **fields: Any) -> Plan:
    """Two stages, half of the budget each; `trials` counts the fixed recipes too."""
    stages = (
        Stage("coarse", space(), 0.2, 0.5),
        Stage("fine", space(layers={"blocks": 2}), 0.1, 1.0),
    )
    given: dict[str, Any] = {
        "fixed": FIXED_RECIPES,
        "stages": stages,
        "optimizer": "random",
        "budget": Budget(trials=trials),
    }
    return Plan(**(given | fields))


class Lab:
    """One run directory; every `study` opens it anew, as another process would."""

    def __init__(self, folder: Path, suite: Path | None = None, location: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.suite_path = suite or write_suite(folder)
        self.location = location or str(folder / "study.journal")
        self.warnings: list[str] = []

    def log(self) -> TrialLog:
        return TrialLog(self.location, "lab", exclusive=True)

    def study(self, plan: Plan, engine: FakeEngine, **fields: Any) -> Study:
        suite = Suite.load(self.suite_path)
        book = Scorebook(engine, suite, ItemStore(self.folder / "items"), self.warnings.append)
        return Study(plan, suite, book, self.log(), **fields)


def history(study: Study) -> list[tuple[Any, ...]]:
    """Everything of a study's trials but times."""
    return [tuple((k, v) for k, v in vars(trial).items() if k not in TIMES) for trial in study.log]


def search_trials(study: Study) -> list[Trial]:
    return [trial for trial in study.log if trial.stage != FIXED]
