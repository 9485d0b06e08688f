"""Scores the fixed recipes: base and sources in full, merges on part of the items, the best of those in full.

What is done next is a function of the recorded trials alone, so that an interruption changes nothing.

Imports: `evaluate`, `study`; never torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from evomerge.errors import EngineError
from evomerge.evaluate.evaluator import subset
from evomerge.evaluate.score import Score, score_tasks
from evomerge.study.fixed import FixedRecipe
from evomerge.study.plan import Plan
from evomerge.study.recorder import Recorder
from evomerge.study.scoring import Scored
from evomerge.study.trial import FIXED, Outcome, Trial

FAILURES = 2  # FAILED trials of a fixed recipe after which it is given up


class Baselines:
    """The fixed recipes of a plan and what is recorded of them."""

    def __init__(self, plan: Plan, recorder: Recorder) -> None:
        self._plan, self._recorder = plan, recorder
        self._last: dict[str, Trial] = {}
        self._screened: dict[str, float] = {}
        self._failures: Counter[str] = Counter()
        for trial in recorder.log:
            if trial.stage == FIXED:
                self._count(trial)

    def score(self) -> None:
        """Score what is not yet scored; sets the recorder's `best_source`.

        A recipe that FAILED is tried again after all others, and on and on while none could be scored: these
        trials are the warm start of the search and cannot be missed.

        Raises:
            EngineError: too many trials failed in a row, or a source that `normalized` needs failed.
        """
        self._score_references()
        merges = [fixed for fixed in self._plan.fixed if fixed.kind == "fixed"]
        for fixed in merges:
            if fixed.label not in self._last:
                self._record(fixed, self._ask(fixed, part=True))
        screened = [fixed for fixed in merges if fixed.label in self._screened]
        screened.sort(key=lambda fixed: -self._screened[fixed.label])
        for fixed in screened[: self._plan.promote]:
            if self._last[fixed.label].outcome is Outcome.PRUNED:
                self._record(fixed, self._ask(fixed))
        while (failed := self._to_repeat()) is not None:
            self._record(failed, self._ask(failed))

    def _score_references(self) -> None:
        """Base and sources; for `normalized`, which divides by sources, all before any is recorded."""
        normalized = self._recorder.suite.aggregate == "normalized"
        references = [fixed for fixed in self._plan.fixed if fixed.kind != "fixed"]
        waiting: list[tuple[FixedRecipe, Scored]] = []
        for fixed in references:
            if fixed.label not in self._last:
                waiting.append((fixed, self._ask(fixed, ahead=len(waiting))))
                if not normalized:
                    self._record(*waiting.pop())
        if normalized:
            self._recorder.best_source = self._best_source(waiting)
        for fixed, scored in waiting:
            self._record(fixed, scored)

    def _best_source(self, waiting: list[tuple[FixedRecipe, Scored]]) -> Mapping[str, float]:
        """Each task's score of its best source; 0 where no source has one."""
        scores: dict[str, Mapping[str, Score]] = {label: t.scores for label, t in self._last.items()}
        for fixed, scored in waiting:
            if scored.outcome is Outcome.FAILED:
                raise EngineError(
                    f"`{fixed.label}` was not scored, but `normalized` needs every source: {scored.error}. "
                    "Mend the machine and go on with `evomerge resume`; finished trials are kept"
                )
            scores[fixed.label] = score_tasks(scored.scores)
        sources = [scores[fixed.label] for fixed in self._plan.fixed if fixed.kind == "source"]
        return {
            task: max((source[task].mean for source in sources if task in source), default=0.0)
            for task in self._recorder.suite.tasks
        }

    def _to_repeat(self) -> FixedRecipe | None:
        none_yet = self._recorder.totals.best is None
        failed = [
            fixed
            for fixed in self._plan.fixed
            if self._last[fixed.label].outcome is Outcome.FAILED
            and (none_yet or self._failures[fixed.label] < FAILURES)
        ]
        return min(failed, key=lambda fixed: self._failures[fixed.label], default=None)

    def _ask(self, fixed: FixedRecipe, *, part: bool = False, ahead: int = 0) -> Scored:
        items = self._recorder.items
        if part and self._plan.screen is not None:
            items = subset(self._recorder.suite, "calibration", self._plan.screen)
        return self._recorder.score(fixed.recipe, items, ahead)

    def _record(self, fixed: FixedRecipe, scored: Scored) -> None:
        partial = scored.outcome is Outcome.COMPLETE and len(scored.scores) < len(self._recorder.items)
        outcome = Outcome.PRUNED if partial else scored.outcome
        self._count(self._recorder.record(scored, stage=FIXED, label=fixed.label, outcome=outcome))

    def _count(self, trial: Trial) -> None:
        self._last[trial.label] = trial
        self._failures[trial.label] += trial.outcome is Outcome.FAILED
        if trial.outcome is Outcome.PRUNED and trial.fitness is not None:
            self._screened[trial.label] = trial.fitness
