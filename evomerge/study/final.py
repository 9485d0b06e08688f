"""The honest end of a run: the winner is chosen on `selection` items and scored once on `held_out` items.

The top few recipes by calibration and the best fixed recipe meet on items that the search never saw. The
winner there, every source and every fixed recipe then answer the held-out items, and the winner is
compared with each by a paired bootstrap over items.

Imports: `evaluate`, `study`; never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import EngineError
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
from evomerge.study.study import Study, best_trial
from evomerge.study.trial import FIXED, Trial

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
        """Select, then score the winner and its rivals on the held-out items, once."""
        finalists = self.finalists()
        selection = {e.recipe.digest: self._score(e, "selection") for e in finalists}
        fitness = {digest: self._interval(scores) for digest, scores in selection.items()}
        winner = max(finalists, key=lambda e: fitness[e.recipe.digest].value)
        rivals = [self._entry(f.label, f.kind, f.recipe) for f in self._study.plan.fixed]
        entries = [winner, *(r for r in rivals if r.recipe.digest != winner.recipe.digest)]
        with self._suite.unsealed():
            held_out = {e.recipe.digest: self._score(e, "held_out") for e in entries}
        rows = [self._row(e, winner, fitness, held_out) for e in entries]
        rows[1:] = sorted(rows[1:], key=lambda e: -(e.held_out.value if e.held_out else 0.0))
        sizes = list(self._suite.sizes().values())
        items = {split: sum(task[split] for task in sizes) for split in SPLITS}
        return Result(rows[0], tuple(rows), items)

    def finalists(self) -> list[Entry]:
        """The top few of the search by calibration, and the best fixed recipe; distinct recipes only."""
        ranked = sorted(
            (t for t in self._study.log if t.told is not None), key=lambda t: (-(t.told or 0.0), t.number)
        )
        chosen: dict[str, Entry] = {}
        for trial in ranked:
            if trial.stage != FIXED and len(chosen) < self._top and trial.digest not in chosen:
                chosen[trial.digest] = self._of_trial(trial)
        fixed = best_trial(t for t in ranked if t.stage == FIXED)
        if fixed is not None:
            chosen.setdefault(fixed.digest, self._of_trial(fixed))
        if not chosen:
            raise EngineError("no recipe could be scored, so there is none to select")
        return list(chosen.values())

    def _of_trial(self, trial: Trial) -> Entry:
        kinds: dict[str, Kind] = {f.label: f.kind for f in self._study.plan.fixed}
        kind = kinds.get(trial.label, "search")
        label = trial.label or f"trial {trial.number}"
        return Entry(label, kind, self._study.recipe_of(trial), trial.told)

    def _entry(self, label: str, kind: Kind, recipe: Recipe) -> Entry:
        told = [t.told for t in self._study.log if t.digest == recipe.digest and t.told is not None]
        return Entry(label, kind, recipe, told[0] if told else None)

    def _score(self, entry: Entry, split: Split) -> Sequence[ItemScore]:
        items = subset(self._suite, split)
        scored = self._book.score(entry.recipe, items, f"{split}/{entry.recipe.digest[:12]}")
        if scored.error:
            raise EngineError(
                f"{entry.label} could not be scored on the {split} items: {scored.error}. "
                "Go on with `evomerge resume`; what has been scored is kept"
            )
        self._progress(f"{split}: {entry.label} {self._interval(scored.scores).value:.3f}")
        return scored.scores

    def _row(
        self,
        entry: Entry,
        winner: Entry,
        selection: Mapping[str, Estimate],
        held_out: Mapping[str, Sequence[ItemScore]],
    ) -> Entry:
        mine = held_out[entry.recipe.digest]
        lead = None
        if entry is not winner:
            best = values_by_task(held_out[winner.recipe.digest])
            lead = paired_bootstrap(best, values_by_task(mine), seed=self._seed, **self._rule())
        return Entry(
            entry.label,
            entry.kind,
            entry.recipe,
            entry.calibration,
            selection.get(entry.recipe.digest),
            self._interval(mine),
            score_tasks(mine),
            lead,
        )

    def _interval(self, scores: Sequence[ItemScore]) -> Estimate:
        return interval(values_by_task(scores), seed=self._seed, **self._rule())

    def _rule(self) -> dict[str, Any]:
        suite = self._suite
        return {
            "weights": suite.weights,
            "kind": suite.aggregate,
            "best_source": self._study.best_source(),
        }
