"""From a scored recipe to a recorded trial, with its fitness; keeps the running totals.

Imports: `evaluate`, `study`; never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evomerge.errors import EngineError, FitnessError
from evomerge.evaluate.evaluator import subset
from evomerge.evaluate.items import Item
from evomerge.evaluate.score import Fitness, ItemScore, Score, aggregate, score_tasks
from evomerge.evaluate.task import Suite
from evomerge.recipe import Recipe
from evomerge.search.base import Parameter
from evomerge.study.scoring import Scorebook, Scored
from evomerge.study.storage import TrialLog
from evomerge.study.totals import Totals
from evomerge.study.trial import Trial

MOST_FAILURES = 5  # FAILED trials in a row after which the run stops instead of spending the night on them
FEWEST_ITEMS = 2  # an interval over items needs two of them


class Recorder:
    """Scores recipes on calibration items and records what came of it.

    Args:
        suite: the tasks; only its calibration items are read here.
        book: scores recipes.
        log: the record of trials.
        clock: seconds since the run began.
        notice: called with every trial once it is recorded.

    Attributes:
        items: every calibration item.
        totals: running sums over `log`.
        best_source: what `normalized` divides by, each task's score of its best source; set once all
            sources are scored, None for the other aggregates.

    Raises:
        FitnessError: a split of a task has too few items for an interval.
    """

    def __init__(
        self,
        suite: Suite,
        book: Scorebook,
        log: TrialLog,
        clock: Callable[[], float],
        notice: Callable[[Trial], None],
    ) -> None:
        for task, sizes in suite.sizes().items():
            for split, size in sizes.items():
                if size < FEWEST_ITEMS:
                    raise FitnessError(
                        f"{suite.path}: task `{task}` has {size} {split} items, but an interval needs at "
                        f"least {FEWEST_ITEMS}; add items or raise the limit"
                    )
        self.suite, self.book, self.log, self.clock = suite, book, log, clock
        self._notice = notice
        self.items: list[Item] = subset(suite, "calibration")
        self.best_source: Mapping[str, float] | None = None
        self.totals = Totals()
        for trial in log:
            self.totals.add(trial)
            book.remember(trial)

    def score(self, recipe: Recipe, items: Sequence[Item], ahead: int = 0) -> Scored:
        """Score a recipe for the trial that is recorded next, or `ahead` trials later."""
        return self.book.score(recipe, items, f"calibration/{self.totals.trials + ahead:06d}-")

    def fitness(self, item_scores: Iterable[ItemScore]) -> tuple[Mapping[str, Score], Fitness]:
        """Scores per task, and the fitness with its standard error."""
        scores = score_tasks(item_scores)
        return scores, aggregate(scores, self.suite.weights, self.suite.aggregate, self.best_source)

    def record(self, scored: Scored, parameters: Sequence[Parameter] = (), **fields: Any) -> Trial:
        """Record a trial and count it; `fields` are those of `Trial` that `scored` does not tell.

        Raises:
            EngineError: this was the last of `MOST_FAILURES` FAILED trials in a row.
            StorageError: it cannot be recorded.
        """
        if scored.scores:
            scores, (fitness, stderr) = self.fitness(scored.scores)
            fields |= {"scores": scores, "fitness": fitness, "stderr": stderr}
        trial = Trial(
            number=self.totals.trials,
            digest=scored.digest,
            record=scored.record,
            items=scored.items,
            merge_seconds=round(scored.merge_seconds, 4),
            evaluate_seconds=round(scored.evaluate_seconds, 4),
            elapsed=round(self.clock(), 3),
            error=scored.error,
            **{"outcome": scored.outcome, **fields},
        )
        self.log.add(trial, parameters)
        self.totals.add(trial)
        self._notice(trial)
        if self.totals.failures >= MOST_FAILURES:
            raise EngineError(
                f"the last {self.totals.failures} trials failed, the last one with: {trial.error}. "
                "Mend the machine and go on with `evomerge resume`; finished trials are kept"
            )
        return trial
