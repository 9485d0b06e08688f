"""One evaluated recipe, as the study records it.

Imports: `search.base`, `evaluate.score`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from evomerge.evaluate.score import Score
from evomerge.search.base import Params

FIXED = "fixed"  # name of the stage that scores the fixed recipes


class Outcome(StrEnum):
    """How a trial ended. Only COMPLETE has a fitness on every calibration item."""

    COMPLETE = "complete"
    PRUNED = "pruned"  # scored on part of the items, not worth the rest
    INFEASIBLE = "infeasible"  # the recipe is wrong
    FAILED = "failed"  # the machine was, twice


@dataclass(frozen=True)
class Trial:
    """What is known of one candidate.

    Attributes:
        number: position in the study, from 0.
        stage: name of the search stage, or `FIXED`.
        restart: how often the stage's optimizer had converged and begun anew.
        label: name of a fixed recipe; empty for proposals.
        params: the proposal's parameters; empty for fixed recipes.
        token: the proposal's token.
        digest: digest of the recipe; empty when the parameters decode to none.
        outcome: see `Outcome`.
        fitness: larger is better; None unless the recipe was scored.
        stderr: standard error of the fitness, None where it is unknown.
        scores: per task.
        record: name of the file of items and completions, empty where none was written.
        items: item evaluations that this trial spent (0 when every score was known).
        merge_seconds: time to merge into the engine.
        evaluate_seconds: time to answer and score the items.
        elapsed: the run's own clock when the trial was recorded, in seconds.
        error: why the trial is INFEASIBLE or FAILED.
    """

    number: int
    stage: str
    outcome: Outcome
    digest: str = ""
    label: str = ""
    restart: int = 0
    params: Params = field(default_factory=dict)
    token: str = ""
    fitness: float | None = None
    stderr: float | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    record: str = ""
    items: int = 0
    merge_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    elapsed: float = 0.0
    error: str = ""

    @property
    def told(self) -> float | None:
        """What the optimizer is told: the fitness of a complete trial, else None (worse than all)."""
        return self.fitness if self.outcome is Outcome.COMPLETE else None
