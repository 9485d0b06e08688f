"""The honest end of a run: the winner is chosen on `selection` items and scored once on `held_out` items.

The top few recipes by calibration and the best fixed recipe meet on items that the search never saw. The
winner there, every source and every fixed recipe then answer the held-out items, and the winner is
compared with each by a paired bootstrap over items.

Imports: `evaluate`, `study`; never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evomerge.errors import EngineError, RecipeError
from evomerge.evaluate.evaluator import subset
from evomerge.evaluate.items import SPLITS, Split
from evomerge.evaluate.score import (
    Estimate,
    Interval,
    ItemScore,
    Score,
    interval,
    paired_bootstrap,
    score_tasks,
    values_by_task,
)
from evomerge.recipe import Recipe
from evomerge.study.scoring import Scorebook
from evomerge.study.study import Study
from evomerge.study.totals import best_trial, fitness
from evomerge.study.trial import Outcome, Trial

Kind = Literal["base", "source", "fixed", "search"]


@dataclass(frozen=True)
class Entry:
    """One recipe of the final comparison.

    Attributes:
        label: a fixed recipe's name, or `trial N`.
        kind: where the recipe comes from.
        recipe: what was scored.
        calibration: fitness on the calibration items, None when it was scored on part of them only.
        selection: fitness on the selection items with its interval; None when it was not scored there.
        held_out: fitness on the held-out items with its interval.
        tasks: held-out score per task.
        lead: how far the winner is ahead of this entry on the held-out items, paired; None for the winner.
    """

    label: str
    kind: Kind
    recipe: Recipe
    calibration: float | None = None
    selection: Estimate | None = None
    held_out: Estimate | None = None
    tasks: Mapping[str, Score] | None = None
    lead: Interval | None = None


@dataclass(frozen=True)
class Result:
    """What a run found: the winner, all entries (winner first, the rest by held-out fitness), item counts."""

    winner: Entry
    entries: tuple[Entry, ...]
    items: Mapping[Split, int]

    @property
    def rivals(self) -> list[tuple[Entry, Interval]]:
        """The best source and the best fixed recipe on the held-out items, with the winner's lead."""
        best_of: dict[Kind, tuple[Entry, Interval]] = {}
        for entry in self.entries:  # by held-out fitness
            if entry.kind in ("source", "fixed") and entry.lead is not None:
                best_of.setdefault(entry.kind, (entry, entry.lead))
        return [best_of[kind] for kind in ("source", "fixed") if kind in best_of]


class Final:
    """Chooses and proves the winner of a finished search; goes on from what an earlier process scored.

    Args:
        study: the search.
        book: scores recipes; shared with the study.
        top: how many recipes of the search meet on the selection items.
        progress: called with a line for each recipe scored.
    """

    def __init__(self, study: Study, book: Scorebook, *, top: int, progress: Callable[[str], None]) -> None:
        self._study, self._book, self._top, self._progress = study, book, top, progress
        self._suite = study.suite
        self._seed = study.plan.seed

    def run(self) -> Result:
        """Select, then score the winner and its rivals on the held-out items, once.

        A recipe that is infeasible, here or on the calibration items, takes no part.

        Raises:
            EngineError: the machine failed; a later call goes on from what has been scored.
            RecipeError: the winner turned out infeasible on the held-out items.
        """
        selection = {e.recipe.digest: (e, self._score(e, "selection")) for e in self.finalists()}
        fitness_of = {d: self._interval(scores) for d, (_, scores) in selection.items() if scores}
        if not fitness_of:
            raise RecipeError(
                "no recipe gives finite scores on the selection items; narrow the weights' range"
            )
        # Among equals the fixed recipe wins: it comes first.
        best = max(fitness_of, key=lambda digest: fitness_of[digest].value)
        winner = selection[best][0]
        fixed = [self._entry(f.label, f.kind, f.recipe) for f in self._study.plan.fixed]
        entries = [winner, *(e for e in fixed if e.recipe.digest != best)]
        with self._suite.unsealed():
            held_out = [self._score(e, "held_out") for e in entries]
        if not held_out[0]:
            raise RecipeError(f"`{winner.label}` gives no finite scores on the held-out items; search again")
        rows = [
            replace(
                entry,
                selection=fitness_of.get(entry.recipe.digest),
                held_out=self._interval(scores),
                tasks=score_tasks(scores),
                lead=None if entry is winner else self._lead(held_out[0], scores),
            )
            for entry, scores in zip(entries, held_out, strict=True)
            if scores
        ]
        rows[1:] = sorted(rows[1:], key=lambda e: -(e.held_out.value if e.held_out else 0.0))
        sizes = list(self._suite.sizes().values())
        items = {split: sum(task[split] for task in sizes) for split in SPLITS}
        return Result(rows[0], tuple(rows), items)

    def finalists(self) -> list[Entry]:
        """The best fixed recipe, then the top few that the search found, by calibration; all distinct.

        Raises:
            EngineError: no recipe is complete.
        """
        log, fixed = self._study.log, {f.recipe.digest: f for f in self._study.plan.fixed}
        best = best_trial(t for t in log if t.digest in fixed)
        found: dict[str, Trial] = {}
        complete = (t for t in log if t.told is not None and t.digest not in fixed)
        for trial in sorted(complete, key=fitness, reverse=True):
            found.setdefault(trial.digest, trial)
        chosen = [
            Entry(f"trial {t.number}", "search", self._study.recipe_of(t), t.told)
            for t in list(found.values())[: self._top]
        ]
        if best is not None:
            known = fixed[best.digest]
            chosen.insert(0, Entry(known.label, known.kind, known.recipe, best.told))
        if not chosen:
            raise EngineError("no recipe could be scored, so there is none to select; see `evomerge status`")
        return chosen

    def _entry(self, label: str, kind: Kind, recipe: Recipe) -> Entry:
        digest = recipe.digest
        told = (t.told for t in self._study.log if t.digest == digest and t.told is not None)
        return Entry(label, kind, recipe, next(told, None))

    def _score(self, entry: Entry, split: Split) -> Sequence[ItemScore]:
        """Item scores, in the order of the items; empty when the recipe is infeasible."""
        scored = self._book.score(entry.recipe, subset(self._suite, split), f"{split}/")
        name = split.replace("_", "-")
        if scored.outcome is Outcome.FAILED:
            raise EngineError(
                f"`{entry.label}` could not be scored on the {name} items: {scored.error}. "
                "Go on with `evomerge resume`; what has been scored is kept"
            )
        shown = f"{self._interval(scored.scores).value:.3f}" if scored.scores else scored.error
        self._progress(f"{name}: {entry.label} {shown}")
        return scored.scores

    def _lead(self, winner: Sequence[ItemScore], other: Sequence[ItemScore]) -> Interval:
        return paired_bootstrap(
            values_by_task(winner), values_by_task(other), seed=self._seed, **self._rule()
        )

    def _interval(self, scores: Sequence[ItemScore]) -> Estimate:
        return interval(values_by_task(scores), seed=self._seed, **self._rule())

    def _rule(self) -> dict[str, Any]:
        suite = self._suite
        return {
            "weights": suite.weights,
            "kind": suite.aggregate,
            "best_source": self._study.best_source,
        }
