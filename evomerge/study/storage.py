"""The record of trials: one Optuna study, in one file of the run directory or at any Optuna URL.

A trial is added whole, with one write, when it is finished: a killed process leaves every finished trial
and nothing half done. Optuna's dashboard, plots and importances read the same study. Optuna's journal is the
default: a trial costs it milliseconds where SQLite takes tens of them (benchmarks/loop.md).

Imports: optuna, `study.trial`, `study.frozen`; never torch.
"""

from __future__ import annotations

import glob
import json
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from evomerge.errors import StorageError
from evomerge.search.base import Parameter
from evomerge.study.frozen import from_optuna, to_optuna
from evomerge.study.trial import Trial

JOURNAL = "study.journal"  # name of the default storage file in a run directory


class TrialLog:
    """Trials of one study, in order.

    Args:
        location: an Optuna URL (`sqlite:///...`, `postgresql://...`), or the path of a journal file.
        name: the study's name; made when it does not exist.
        exclusive: whether this process alone writes to a journal file; then a line and a lock that a
            killed process left half done are cleared away.

    Raises:
        StorageError: the storage cannot be opened or is damaged, or the study is not ours.
    """

    def __init__(self, location: str, name: str, *, exclusive: bool = False) -> None:
        self.location = re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", location)  # shown, so without password
        with self._errors():
            if exclusive and "://" not in location:
                _clear(Path(location))
            try:
                with _quiet_optuna():
                    self._storage = _open(location)
                    self._study = _study(self._storage, name)
                    frozen = self._study.get_trials(deepcopy=False)
            except (ValueError, KeyError, TypeError, AssertionError) as error:  # Optuna met a damaged line
                raise StorageError(
                    f"{self.location}{_damage(location)}: damaged ({type(error).__name__}: {error}); restore "
                    "the file, or cut it off before that place to go on from the trials before it"
                ) from error
            if _last_line_damaged(location):  # Optuna overlooks it until the next line is written
                raise StorageError(
                    f"{self.location}{_damage(location)}: damaged (not JSON); delete that line"
                )
            self._trials = [from_optuna(trial, self.location) for trial in frozen]

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
            StorageError: the write failed (a full disk, a lost database), or another process writes to this
                study.
        """
        assert trial.number == len(self._trials), "trials are recorded in order"
        with self._errors():
            trial_id = self._storage.create_new_trial(
                self._study._study_id, template_trial=to_optuna(trial, parameters)
            )
            number = self._storage.get_trial_number_from_id(trial_id)
        if number != trial.number:
            raise StorageError(
                f"{self.location}: trial {trial.number} was recorded as {number}, so another process writes "
                f"to study `{self._study.study_name}`; stop it, and give this run its own name or storage"
            )
        self._trials.append(trial)

    def note(self, key: str, value: Any) -> None:
        """Record a JSON value of the whole study."""
        with self._errors():
            self._study.set_user_attr(key, value)

    def notes(self) -> Mapping[str, Any]:
        """All values that `note` recorded."""
        with self._errors():
            return self._study.user_attrs

    def close(self) -> None:
        """Give back database connections."""
        self._storage.remove_session()
        if isinstance(self._storage, RDBStorage):
            self._storage.engine.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What a file system, a database or Optuna raises, as `StorageError`."""
        try:
            with _uninterrupted():
                yield
        except ImportError as error:
            raise StorageError(
                f"{self.location}: the database's driver is missing ({error}); install it"
            ) from error
        except (OSError, optuna.exceptions.OptunaError) as error:
            raise StorageError(_kept(self.location, error)) from error
        except Exception as error:
            # SQLAlchemy is imported only by Optuna's database storage, and so are its errors.
            if type(error).__module__.startswith("sqlalchemy"):
                raise StorageError(_kept(self.location, error)) from error
            raise


def _kept(location: str, error: Exception) -> str:
    text = str(error).split("\n")[0]
    return (
        f"{location}: {text}; free space, or check the path and its rights. Finished trials are kept, and "
        "`evomerge resume` goes on from them"
    )


def _open(location: str) -> BaseStorage:
    return RDBStorage(location) if "://" in location else JournalStorage(JournalFileBackend(location))


def _study(storage: BaseStorage, name: str) -> optuna.Study:
    """The study `name`. Looked up first: a journal is written to even by the attempt to make it again."""
    if any(study.study_name == name for study in storage.get_all_studies()):
        return optuna.load_study(study_name=name, storage=storage)
    return optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)


def _clear(path: Path) -> None:
    """Take away what a killed writer left of a journal: half a line at the end, and Optuna's lock.

    The lock is a symbolic link beside the file, renamed before it is removed.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.lock*"):
        left.unlink(missing_ok=True)
    if path.exists():
        with path.open("rb+") as file:
            whole = _whole_lines(file.read())
            if len(whole) < file.tell():
                file.truncate(len(whole))


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _last_line_damaged(location: str) -> bool:
    """Whether the last whole line of a journal is not JSON."""
    if "://" in location:
        return False
    whole = _whole_lines(Path(location).read_bytes())
    return bool(whole) and not _is_json(whole[whole.rfind(b"\n", 0, -1) + 1 :])


def _damage(location: str) -> str:
    """`:N` with the number of the first line of a journal that is not JSON; empty where there is none."""
    lines = b"" if "://" in location else _whole_lines(Path(location).read_bytes())
    numbers = (n for n, line in enumerate(lines.splitlines(), start=1) if not _is_json(line))
    return next((f":{number}" for number in numbers), "")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, the second one does not.

    Optuna's journal would be left with half a lock, and the command would end with that error.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(came) == 1:
            before(came[0], None)


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
