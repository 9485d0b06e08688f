"""From a recipe to scores: load it into the engine, ask the items, never the same item of a recipe twice.

Imports: `engine.base`, `evaluate`, `recipe`; never torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.engine.base import Engine
from evomerge.errors import EngineError, RecipeError
from evomerge.evaluate.evaluator import evaluate
from evomerge.evaluate.items import Item
from evomerge.evaluate.records import ItemStore
from evomerge.evaluate.score import ItemScore
from evomerge.evaluate.task import Suite
from evomerge.recipe import Recipe
from evomerge.study.trial import Outcome

TRIES = 2  # a machine failure is retried once before the trial counts as FAILED


@dataclass(frozen=True)
class Scored:
    """What came of scoring one recipe on some items; `scores` is in the order of the items."""

    outcome: Outcome
    scores: tuple[ItemScore, ...] = ()
    record: str = ""
    items: int = 0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    error: str = ""


@dataclass
class Scorebook:
    """Scores recipes and remembers every item score by recipe digest.

    Attributes:
        engine: holds the candidate.
        suite: the tasks.
        store: where items and completions are written.
        warn: called with a message when a try failed.
    """

    engine: Engine
    suite: Suite
    store: ItemStore
    warn: Callable[[str], None]
    _records: dict[str, list[str]] = field(default_factory=dict)

    def remember(self, digest: str, record: str) -> None:
        """Tell of a record that an earlier process wrote."""
        if record:
            self._records.setdefault(digest, []).append(record)

    def known(self, digest: str) -> Mapping[tuple[str, str], ItemScore]:
        """Item scores of a recipe by (task, item)."""
        return {
            (score.task, score.item): score
            for record in self._records.get(digest, ())
            for score in self.store.read(record)
        }

    def score(self, recipe: Recipe, items: Sequence[Item], record: str) -> Scored:
        """Scores of `recipe` on `items`; those not yet known are asked and written to `record`.

        An infeasible recipe and a machine that failed twice are outcomes, not exceptions.
        """
        digest = recipe.digest
        known = self.known(digest)
        missing = [item for item in items if (item.task, item.id) not in known]
        merge_seconds = evaluate_seconds = 0.0
        if missing:
            for attempt in range(1, TRIES + 1):
                try:
                    merge_seconds = self.engine.load(recipe).seconds
                    start = time.perf_counter()
                    fresh = evaluate(self.engine, self.suite, missing)
                    evaluate_seconds = time.perf_counter() - start
                    break
                except RecipeError as error:
                    return Scored(Outcome.INFEASIBLE, error=str(error))
                except EngineError as error:
                    self.warn(f"{record} (recipe {digest[:12]}): {error} (try {attempt} of {TRIES})")
                    if attempt == TRIES:
                        return Scored(Outcome.FAILED, error=str(error))
            self.store.write(record, fresh)
            self.remember(digest, record)
            known = {**known, **{(score.task, score.item): score for score in fresh}}
        return Scored(
            Outcome.COMPLETE,
            tuple(known[item.task, item.id] for item in items),
            record if missing else "",
            len(missing),
            merge_seconds,
            evaluate_seconds,
        )
