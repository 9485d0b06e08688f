"""A trial as Optuna stores it, and back: parameters and values as Optuna's own, the rest as user attributes.

Imports: optuna, `search.base`, `study.trial`; never torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.errors import StorageError
from evomerge.evaluate.score import Score
from evomerge.search.base import CategoricalParameter, Parameter
from evomerge.study.trial import Outcome, Trial

_STATES = {
    Outcome.COMPLETE: TrialState.COMPLETE,
    Outcome.PRUNED: TrialState.PRUNED,
    Outcome.INFEASIBLE: TrialState.FAIL,
    Outcome.FAILED: TrialState.FAIL,
}


def to_optuna(trial: Trial, parameters: Sequence[Parameter]) -> FrozenTrial:
    """A finished Optuna trial; `parameters` are those of `trial.params`."""
    attrs = {
        "outcome": trial.outcome.value,
        "stage": trial.stage,
        "restart": trial.restart,
        "label": trial.label,
        "recipe": trial.digest,
        "token": trial.token,
        "fitness": trial.fitness,
        "stderr": trial.stderr,
        "scores": {task: list(score) for task, score in trial.scores.items()},
        "record": trial.record,
        "items": trial.items,
        "merge_seconds": trial.merge_seconds,
        "evaluate_seconds": trial.evaluate_seconds,
        "elapsed": trial.elapsed,
        "error": trial.error,
    }
    partial = trial.outcome is Outcome.PRUNED and trial.fitness is not None
    scored = sum(score.n for score in trial.scores.values())
    frozen = create_trial(
        state=_STATES[trial.outcome],
        value=trial.told,
        params=dict(trial.params),
        distributions=_distributions(parameters) if trial.params else {},
        user_attrs={key: value for key, value in attrs.items() if value not in ("", None, {})},
        intermediate_values={scored: float(trial.fitness or 0.0)} if partial else None,
    )
    frozen.datetime_complete = datetime.now()
    frozen.datetime_start = frozen.datetime_complete - timedelta(
        seconds=trial.merge_seconds + trial.evaluate_seconds
    )
    return frozen


def from_optuna(frozen: FrozenTrial, where: str) -> Trial:
    """Inverse of `to_optuna`; raises `StorageError` for a trial of another program."""
    attrs = frozen.user_attrs
    try:
        return Trial(
            number=frozen.number,
            stage=attrs["stage"],
            outcome=Outcome(attrs["outcome"]),
            digest=attrs.get("recipe", ""),
            label=attrs.get("label", ""),
            restart=attrs["restart"],
            params=frozen.params,
            token=attrs.get("token", ""),
            fitness=attrs.get("fitness"),
            stderr=attrs.get("stderr"),
            scores={task: Score(*values) for task, values in attrs.get("scores", {}).items()},
            record=attrs.get("record", ""),
            items=attrs["items"],
            merge_seconds=attrs["merge_seconds"],
            evaluate_seconds=attrs["evaluate_seconds"],
            elapsed=attrs["elapsed"],
            error=attrs.get("error", ""),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(
            f"{where}: trial {frozen.number} was not written by evomerge ({type(error).__name__}: {error}); "
            "use another study name or storage"
        ) from error


def _distributions(parameters: Sequence[Parameter]) -> dict[str, BaseDistribution]:
    return {
        p.name: CategoricalDistribution(p.choices)
        if isinstance(p, CategoricalParameter)
        else FloatDistribution(p.low, p.high)
        for p in parameters
    }
