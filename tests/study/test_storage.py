"""The record of trials: plain Optuna, crash-safe, and clear about what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
import signal

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from evomerge.errors import StorageError
from evomerge.evaluate.score import Score
from evomerge.search.base import CategoricalParameter, FloatParameter
from evomerge.study.storage import TrialLog
from evomerge.study.trial import Outcome, Trial

PARAMETERS = (FloatParameter("w", -1.0, 2.0), CategoricalParameter("method", ("linear", "ties")))
SCORES = {"math": Score(0.5, 0.1, 25), "text": Score(-1 / 3, None, 1)}
TRIALS = [
    Trial(0, "fixed", Outcome.PRUNED, "aa", "ties", fitness=0.1, scores=SCORES, record="c/0", items=26),
    Trial(
        number=1,
        stage="coarse",
        outcome=Outcome.COMPLETE,
        digest="bb",
        restart=2,
        params={"w": 0.1 + 0.2, "method": "ties"},
        token='{"v": [0.1]}',
        fitness=1 / 3,
        stderr=0.01,
        scores=SCORES,
        record="c/1",
        items=26,
        merge_seconds=1.5,
        evaluate_seconds=2.25,
        elapsed=10.125,
    ),
    Trial(2, "coarse", Outcome.INFEASIBLE, params={"w": 2.0, "method": "linear"}, error="weights sum to 0"),
    Trial(3, "coarse", Outcome.FAILED, "cc", params={"w": -1.0, "method": "ties"}, error="out of memory"),
]
every_location = pytest.mark.parametrize("location", ["journal", "sqlite"])


def at(folder, location: str = "journal") -> str:
    return str(folder / "study.journal") if location == "journal" else f"sqlite:///{folder}/study.db"


def fill(location: str, trials=TRIALS) -> None:
    log = TrialLog(location, "run")
    for trial in trials:
        log.add(trial, PARAMETERS)
    log.close()


@every_location
def test_trials_come_back_as_they_were(tmp_path, location):
    fill(at(tmp_path, location))
    log = TrialLog(at(tmp_path, location), "run")
    assert list(log) == list(log.trials) == TRIALS
    log.close()


@every_location
def test_notes_come_back(tmp_path, location):
    log = TrialLog(at(tmp_path, location), "run")
    log.note("engine", {"name": "fake", "devices": [0, 1]})
    log.close()
    later = TrialLog(at(tmp_path, location), "run")
    assert later.notes() == {"engine": {"name": "fake", "devices": [0, 1]}}
    later.close()


@every_location
def test_the_record_is_a_plain_optuna_study(tmp_path, location):
    fill(at(tmp_path, location))
    path = at(tmp_path, location)
    storage = path if location == "sqlite" else JournalStorage(JournalFileBackend(path))
    study = optuna.load_study(study_name="run", storage=storage)
    assert study.best_trial.number == 1
    assert study.best_params == {"w": 0.1 + 0.2, "method": "ties"}
    assert study.best_value == 1 / 3
    assert study.best_trial.user_attrs["stage"] == "coarse"
    assert study.best_trial.user_attrs["scores"]["math"] == [0.5, 0.1, 25]
    assert study.best_trial.duration.total_seconds() == 3.75
    assert [t.state for t in study.trials] == [
        TrialState.PRUNED,
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.FAIL,
    ]
    assert study.trials[0].intermediate_values == {26: 0.1}
    if location == "sqlite":
        study._storage._backend.engine.dispose()


def test_half_a_line_at_the_end_is_cut_off(tmp_path):
    fill(at(tmp_path))
    path = tmp_path / "study.journal"
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    log = TrialLog(at(tmp_path), "run", exclusive=True)
    assert list(log) == TRIALS[:3]
    log.add(TRIALS[3], PARAMETERS)
    assert list(TrialLog(at(tmp_path), "run")) == TRIALS


def test_a_lock_that_a_killed_process_left_is_taken_away(tmp_path):
    fill(at(tmp_path), TRIALS[:3])
    os.symlink(at(tmp_path), at(tmp_path) + ".lock")
    os.symlink(at(tmp_path), at(tmp_path) + ".lock123.rename")
    log = TrialLog(at(tmp_path), "run", exclusive=True)
    log.add(TRIALS[3], PARAMETERS)
    assert os.listdir(tmp_path) == ["study.journal"]


def test_reading_a_journal_changes_nothing_in_it(tmp_path):
    """A status command may read a study that another process is writing to."""
    fill(at(tmp_path))
    path = tmp_path / "study.journal"
    path.write_bytes(path.read_bytes()[:-40])
    os.symlink(at(tmp_path), at(tmp_path) + ".lock")
    before = path.read_bytes()
    assert list(TrialLog(at(tmp_path), "run")) == TRIALS[:3]
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"{broken", b"\0\0\0", b'{"op_code": 99}', b"[1]", b'"x"'])
def test_damage_in_the_middle_names_the_file_and_where_there_is_one_the_line(tmp_path, damage):
    fill(at(tmp_path))
    path = tmp_path / "study.journal"
    lines = path.read_bytes().split(b"\n")
    lines[3] = damage
    path.write_bytes(b"\n".join(lines))
    line = ":4" if damage in (b"{broken", b"\0\0\0") else ""
    with pytest.raises(StorageError, match=rf"study\.journal{line}: damaged .*cut it off before that place"):
        TrialLog(at(tmp_path), "run", exclusive=True)


def test_damage_in_the_last_line_is_not_overlooked(tmp_path):
    fill(at(tmp_path))
    path = tmp_path / "study.journal"
    path.write_bytes(path.read_bytes() + b"{broken\n")
    number = path.read_bytes().count(b"\n")
    with pytest.raises(StorageError, match=rf"study\.journal:{number}: damaged"):
        TrialLog(at(tmp_path), "run", exclusive=True)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "study.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=r"sqlite.*not a database"):
        TrialLog(at(tmp_path, "sqlite"), "run")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="check the path and its rights"):
        TrialLog(str(tmp_path / "file" / "study.journal"), "run", exclusive=True)
    with pytest.raises(StorageError, match="sqlite"):
        TrialLog(f"sqlite:///{tmp_path}/missing/study.db", "run")


def test_a_full_disk_is_said_and_the_trials_before_it_are_kept(tmp_path, monkeypatch):
    log = TrialLog(at(tmp_path), "run")
    log.add(TRIALS[0], PARAMETERS)

    def full(descriptor):
        os.truncate(at(tmp_path), os.path.getsize(at(tmp_path)) - 30)  # what did not fit
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device; free space.*trials are kept"):
            log.add(TRIALS[1], PARAMETERS)
    assert list(log) == TRIALS[:1]
    assert list(TrialLog(at(tmp_path), "run", exclusive=True)) == TRIALS[:1]


def test_a_study_of_another_program_is_refused(tmp_path):
    storage = JournalStorage(JournalFileBackend(at(tmp_path)))
    study = optuna.create_study(study_name="run", storage=storage)
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StorageError, match=r"trial 0 was not written by evomerge.*another study name"):
        TrialLog(at(tmp_path), "run")


@every_location
def test_a_second_writer_is_noticed(tmp_path, location):
    first, second = (TrialLog(at(tmp_path, location), "run") for _ in range(2))
    first.add(TRIALS[0], PARAMETERS)
    with pytest.raises(StorageError, match="trial 0 was recorded as 1, so another process writes"):
        second.add(TRIALS[0], PARAMETERS)
    first.close()
    second.close()


def test_a_missing_driver_is_said_without_the_password(tmp_path):
    pytest.importorskip("sqlalchemy")
    with pytest.raises(StorageError) as error:
        TrialLog("postgresql+nothing://me:secret@localhost/studies", "run")
    assert "me:***@localhost" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_journal_line_is_one_trial(tmp_path):
    """What a trial costs does not grow with the number of trials: one appended line."""
    log, path = TrialLog(at(tmp_path), "run"), tmp_path / "study.journal"
    before = path.read_bytes()
    log.add(TRIALS[0], PARAMETERS)
    content = path.read_bytes()
    assert content.startswith(before)
    assert json.loads(content[len(before) :])["user_attrs"]["label"] == "ties"


def test_ctrl_c_in_the_middle_of_a_write_waits_until_the_trial_is_written(tmp_path, monkeypatch):
    log = TrialLog(at(tmp_path), "run", exclusive=True)
    rename, pressed = os.rename, []

    def interrupted(*paths: str) -> None:
        """Giving up the journal's lock, the moment at which half a lock could be left."""
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        rename(*paths)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", interrupted)
            with pytest.raises(KeyboardInterrupt):
                log.add(TRIALS[0], PARAMETERS)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    log.close()
    again = TrialLog(at(tmp_path), "run")
    assert list(again) == TRIALS[:1]
    again.add(TRIALS[1], PARAMETERS)
    again.close()
