"""Running sums over the trials of a study: a trial costs the loop the same at 10 and at 5,000.

Imports: `study`; never torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from evomerge.study.budget import Spent
from evomerge.study.trial import FIXED, Outcome, Trial


@dataclass
class Totals:
    """What the loop needs to know of all trials so far.

    Attributes:
        trials, items: how many trials, and item evaluations that they spent.
        work: seconds of merging and evaluation.
        failures: FAILED trials in a row, up to the last trial.
        idle: trials of the last trial's stage in a row, up to the last trial, that asked no item.
        best: see `best_trial`.
        last: the last trial.
        fixed: what had been spent when the last fixed recipe was recorded.
        restarts: highest restart by stage.
    """

    trials: int = 0
    items: int = 0
    work: float = 0.0
    failures: int = 0
    idle: int = 0
    best: Trial | None = None
    last: Trial | None = None
    fixed: Spent | None = None
    restarts: dict[str, int] = field(default_factory=dict)

    def add(self, trial: Trial) -> None:
        """Count the next trial."""
        self.trials += 1
        self.items += trial.items
        self.work += trial.merge_seconds + trial.evaluate_seconds
        self.failures = self.failures + 1 if trial.outcome is Outcome.FAILED else 0
        same_stage = self.last is not None and self.last.stage == trial.stage
        self.idle = 0 if trial.items else (self.idle if same_stage else 0) + 1
        if fitness(trial) > fitness(self.best):
            self.best = trial
        if trial.stage == FIXED:
            self.fixed = Spent(self.trials, trial.elapsed, self.items)
        self.restarts[trial.stage] = max(trial.restart, self.restarts.get(trial.stage, 0))
        self.last = trial


def fitness(trial: Trial | None) -> float:
    """What an optimizer is told of a trial; minus infinity for one without a fitness on all items."""
    return trial.told if trial is not None and trial.told is not None else float("-inf")


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The complete trial of largest fitness, the earliest among equals; None when there is none."""
    return max((t for t in trials if t.told is not None), key=lambda t: (fitness(t), -t.number), default=None)
