"""The record of trials: one Optuna study, in one file of the run directory or at any Optuna URL.

A trial is added whole, with one write, when it is finished: a killed process leaves every finished trial
and nothing half done. Optuna's dashboard, plots and importances read the same study.

Imports: optuna, `study.trial`; never torch.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.errors import StorageError
from evomerge.evaluate.score import Score
from evomerge.search.base import CategoricalParameter, Parameter
from evomerge.study.trial import Outcome, Trial

JOURNAL = "study.journal"  # name of the default storage file in a run directory

_STATES = {
    Outcome.COMPLETE: TrialState.COMPLETE,
    Outcome.PRUNED: TrialState.PRUNED,
    Outcome.INFEASIBLE: TrialState.FAIL,
    Outcome.FAILED: TrialState.FAIL,
}


class TrialLog:
    """Trials of one study, in order.

    Args:
        location: an Optuna URL (`sqlite:///...`, `postgresql://...`), or the path of a journal file.
        name: the study's name; made when it does not exist.
        exclusive: whether this process alone writes to a journal file; then a line and a lock that a
            killed process left half done are cleared away.

    Raises:
        StorageError: the storage cannot be opened or is damaged.
    """

    def __init__(self, location: str, name: str, *, exclusive: bool = False) -> None:
        self.location = location
        with _storage_errors(location), _quiet_optuna():
            self._storage = _open(location, exclusive)
            self._study = optuna.create_study(
                study_name=name, storage=self._storage, direction="maximize", load_if_exists=True
            )
            self._trials = [_from_optuna(t) for t in self._study.get_trials(deepcopy=False)]

    @property
    def trials(self) -> Sequence[Trial]:
        """Every recorded trial."""
        return tuple(self._trials)

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials)

    def add(self, trial: Trial, parameters: Sequence[Parameter]) -> None:
        """Record a finished trial; its number must be the next.

        Raises:
            StorageError: the write failed (a full disk, a lost database); the trial is not recorded.
        """
        if trial.number != len(self._trials):
            raise StorageError(
                f"{self.location}: trial {trial.number} was to be recorded, but the next number is "
                f"{len(self._trials)}; another process may be writing to this study"
            )
        frozen = _to_optuna(trial, parameters)
        with _storage_errors(self.location):
            self._storage.create_new_trial(self._study._study_id, template_trial=frozen)
        self._trials.append(trial)

    def note(self, key: str, value: Any) -> None:
        """Record a JSON value of the whole study."""
        with _storage_errors(self.location):
            self._study.set_user_attr(key, value)

    def notes(self) -> Mapping[str, Any]:
        """All values that `note` recorded."""
        with _storage_errors(self.location):
            return self._study.user_attrs

    def close(self) -> None:
        """Give back database connections."""
        self._storage.remove_session()
        if isinstance(self._storage, RDBStorage):
            self._storage.engine.dispose()


def _open(location: str, exclusive: bool) -> BaseStorage:
    if "://" in location:
        return RDBStorage(location)
    if exclusive and os.path.exists(location):
        _drop_torn_line(Path(location))
        # Optuna locks through a symbolic link beside the file; a killed process leaves it behind.
        Path(location + ".lock").unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(location))


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line end: a write that was killed half way."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65_536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _distributions(parameters: Sequence[Parameter]) -> dict[str, BaseDistribution]:
    return {
        p.name: CategoricalDistribution(p.choices)
        if isinstance(p, CategoricalParameter)
        else FloatDistribution(p.low, p.high)
        for p in parameters
    }


def _to_optuna(trial: Trial, parameters: Sequence[Parameter]) -> FrozenTrial:
    attrs = {
        "outcome": trial.outcome.value,
        "stage": trial.stage,
        "restart": trial.restart,
        "label": trial.label,
        "recipe": trial.digest,
        "token": trial.token,
        "fitness": trial.fitness,
        "stderr": trial.stderr,
        "scores": {task: [s.mean, s.stderr, s.n] for task, s in trial.scores.items()},
        "record": trial.record,
        "items": trial.items,
        "merge_seconds": round(trial.merge_seconds, 4),
        "evaluate_seconds": round(trial.evaluate_seconds, 4),
        "elapsed": trial.elapsed,
        "error": trial.error,
    }
    partial = trial.outcome is Outcome.PRUNED and trial.fitness is not None
    return create_trial(
        state=_STATES[trial.outcome],
        value=trial.told,
        params=dict(trial.params),
        distributions=_distributions(parameters) if trial.params else {},
        user_attrs={key: value for key, value in attrs.items() if value not in ("", None, {})},
        intermediate_values={trial.items: float(trial.fitness or 0.0)} if partial else None,
    )


def _from_optuna(frozen: FrozenTrial) -> Trial:
    attrs = frozen.user_attrs
    if "outcome" not in attrs:
        raise StorageError(
            f"trial {frozen.number} was not written by evomerge; use another study name or storage"
        )
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


@contextmanager
def _storage_errors(location: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, json.JSONDecodeError, optuna.exceptions.OptunaError) as error:
        raise StorageError(
            f"{location}: {error}; finished trials are kept, `resume` goes on from them"
        ) from error
    except Exception as error:
        # SQLAlchemy is imported only by Optuna's database storage, and so are its errors.
        if type(error).__module__.startswith("sqlalchemy"):
            raise StorageError(f"{location}: {error}".split("\n")[0]) from error
        raise


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """No "A new study created" line and no experimental warnings from the storage classes."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
