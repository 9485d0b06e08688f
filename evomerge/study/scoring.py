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
from evomerge.study.trial import Outcome, Trial

TRIES = 2  # a machine failure is retried once before the trial counts as FAILED


@dataclass(frozen=True)
class Scored:
    """What came of scoring one recipe on some items; `scores` is in the order of the items.

    The other attributes are those of `Trial`; times are 0 where an interrupted process had asked already.
    """

    outcome: Outcome
    digest: str = ""
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
    _infeasible: dict[str, str] = field(default_factory=dict)

    def remember(self, trial: Trial) -> None:
        """Tell of a trial that an earlier process recorded."""
        if trial.record:
            self._records.setdefault(trial.digest, []).append(trial.record)
        if trial.digest and trial.outcome is Outcome.INFEASIBLE:
            self._infeasible[trial.digest] = trial.error

    def known(self, digest: str) -> Mapping[tuple[str, str], ItemScore]:
        """Item scores of a recipe by (task, item)."""
        records = self._records.get(digest, ())
        return {(s.task, s.item): s for record in records for s in self.store.read(record)}

    def score(self, recipe: Recipe, items: Sequence[Item], prefix: str) -> Scored:
        """Scores of `recipe` on `items`; those not yet known are asked and written.

        An infeasible recipe and a machine that failed twice are outcomes, not exceptions.

        Args:
            prefix: name of the record to write, but for the recipe's digest. A record of this name that a
                process wrote before it was killed is taken as the engine's answer.

        Raises:
            StorageError: the record cannot be written, or one that is needed cannot be read.
        """
        digest = recipe.digest
        if digest in self._infeasible:
            return Scored(Outcome.INFEASIBLE, digest, error=self._infeasible[digest])
        known = self.known(digest)
        missing = [item for item in items if (item.task, item.id) not in known]
        scored = Scored(Outcome.COMPLETE, digest)
        if missing:
            record = prefix + digest[:12]
            scored = self._written(record, digest, missing) or self._ask(recipe, digest, missing, record)
            if scored.outcome is Outcome.INFEASIBLE:
                self._infeasible[digest] = scored.error
            if scored.outcome is not Outcome.COMPLETE:
                return scored
            self._records.setdefault(digest, []).append(record)
            known = {**known, **{(s.task, s.item): s for s in scored.scores}}
        return _with_scores(scored, tuple(known[item.task, item.id] for item in items))

    def _written(self, record: str, digest: str, missing: Sequence[Item]) -> Scored | None:
        """What an interrupted process wrote, provided that it is exactly what is missing."""
        if record not in self.store:
            return None
        scores = tuple(self.store.read(record))
        if [(s.task, s.item) for s in scores] != [(item.task, item.id) for item in missing]:
            return None
        return Scored(Outcome.COMPLETE, digest, scores, record, len(scores))

    def _ask(self, recipe: Recipe, digest: str, missing: Sequence[Item], record: str) -> Scored:
        for attempt in range(1, TRIES + 1):
            try:
                merge_seconds = self.engine.load(recipe).seconds
                start = time.perf_counter()
                scores = evaluate(self.engine, self.suite, missing)
                seconds = time.perf_counter() - start
            except RecipeError as error:
                return Scored(Outcome.INFEASIBLE, digest, error=str(error))
            except EngineError as error:
                self.warn(f"{record}: {error} (try {attempt} of {TRIES})")
                failed = Scored(Outcome.FAILED, digest, error=str(error))
            else:
                self.store.write(record, scores)
                scored = tuple(scores)
                return Scored(Outcome.COMPLETE, digest, scored, record, len(scored), merge_seconds, seconds)
        return failed


def _with_scores(scored: Scored, scores: tuple[ItemScore, ...]) -> Scored:
    return Scored(**{**vars(scored), "scores": scores})
