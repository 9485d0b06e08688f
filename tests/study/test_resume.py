"""A killed run loses no finished trial and goes on exactly as if it had not been killed (promise 2)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.errors import EngineError, RecipeError
from evomerge.recipe import Recipe
from evomerge.study.plan import Plan, Stage
from evomerge.study.study import Study
from tests.study.lab import Fitness, Lab, bowl, engine, history, plan, space, write_suite

TRIALS = 60  # enough for five flat generations of four in each stage: cma and mixed begin anew


class Stop(BaseException):
    """An interruption that nothing catches, as a kill is."""


def rough(recipe: Recipe, prompt: str) -> float:
    """A bowl; some recipes are infeasible, some fail the machine, always the same ones."""
    number = int(recipe.digest[:6], 16)
    if number % 13 == 0:
        raise RecipeError("not finite")
    if number % 17 == 0:
        raise EngineError("out of memory")
    return bowl(recipe, prompt)


def flat(recipe: Recipe, prompt: str) -> float:
    """Nothing to find: an optimizer that notices stops, and the study begins it anew."""
    return 0.0


def plan_for(name: str) -> Plan:
    sized = {"population_size": 4} if name in ("cma", "mixed") else {}
    stages = [Stage("coarse", space(), 0.2, 0.5), Stage("fine", space(layers={"blocks": 2}), 0.1, 1.0)]
    if name == "mixed":
        several = {"methods": ["task_arithmetic", "linear"]}
        stages[1] = Stage("fine", space(layers={"blocks": 2}, **several), 0.1, 1.0)
    return plan(TRIALS, optimizer=name, stages=tuple(stages), screen=2, promote=1, **sized)


def stop_in_engine(study: Study, k: int) -> None:
    """Stop in the middle of every k-th candidate."""
    fake, calls = study._recorder.book.engine, iter(range(1, 10_000))
    ask = fake.loglikelihood

    def loglikelihood(requests):
        if next(calls) % k == 0:
            raise Stop
        return ask(requests)

    fake.loglikelihood = loglikelihood


def stop_before_recording(study: Study, k: int) -> None:
    """Stop when the items of every k-th trial are on disk and the trial is not."""
    add, calls = study.log.add, iter(range(1, 10_000))

    def stopping(trial, parameters):
        if next(calls) % k == 0:
            raise Stop
        add(trial, parameters)

    study.log.add = stopping


def stop_before_telling(study: Study, k: int) -> None:
    """Stop when every k-th trial is recorded and the optimizer does not know."""
    add, calls = study.log.add, iter(range(1, 10_000))

    def stopping(trial, parameters):
        add(trial, parameters)
        if next(calls) % k == 0:
            raise Stop

    study.log.add = stopping


def run_to_the_end(
    lab: Lab, plan: Plan, fitness: Fitness, stop: Callable[[Study, int], None], k: int
) -> Study:
    for _ in range(3 * TRIALS):
        study = lab.study(plan, engine(fitness))
        stop(study, k)
        try:
            study.run()
        except Stop:
            continue
        return study
    raise AssertionError("the run does not get on")


@pytest.mark.parametrize("stop", [stop_in_engine, stop_before_recording, stop_before_telling])
@pytest.mark.parametrize("name", ["cma", "mixed", "tpe", "random"])
def test_a_run_that_is_stopped_again_and_again_makes_the_trials_of_one_that_is_not(name, stop, tmp_path):
    """With infeasible and failed trials among them."""
    plan = plan_for(name)
    whole = Lab(tmp_path / "whole").study(plan, engine(rough))
    whole.run()
    assert {str(trial.outcome) for trial in whole.log} == {"complete", "pruned", "infeasible", "failed"}
    assert history(run_to_the_end(Lab(tmp_path / "stopped"), plan, rough, stop, 9)) == history(whole)


@pytest.mark.parametrize("name", ["cma", "mixed"])
def test_a_stopped_run_goes_on_in_the_middle_of_a_restart(name, tmp_path):
    plan = plan_for(name)
    whole = Lab(tmp_path / "whole").study(plan, engine(flat))
    whole.run()
    assert {(t.stage, t.restart) for t in whole.log} >= {("coarse", 1), ("fine", 1)}
    stopped = run_to_the_end(Lab(tmp_path / "stopped"), plan, flat, stop_before_recording, 7)
    assert history(stopped) == history(whole)


def test_a_run_that_is_stopped_after_every_trial_makes_the_same_trials(tmp_path):
    plan = plan_for("cma")
    whole = Lab(tmp_path / "whole").study(plan, engine(rough))
    whole.run()
    stopped = run_to_the_end(Lab(tmp_path / "stopped"), plan, rough, stop_before_telling, 1)
    assert history(stopped) == history(whole)


def test_a_run_in_a_database_goes_on_as_one_in_a_journal(tmp_path):
    plan = plan_for("cma")
    whole = Lab(tmp_path / "whole").study(plan, engine(rough))
    whole.run()
    lab = Lab(tmp_path / "sql", location=f"sqlite:///{tmp_path}/study.db")
    assert history(run_to_the_end(lab, plan, rough, stop_in_engine, 25)) == history(whole)


@pytest.mark.parametrize("aggregate", ["mean", "normalized"])
def test_no_item_is_asked_twice_however_often_a_run_is_stopped(aggregate, tmp_path):
    """Stopped when items are on disk and their trial is not: the answers are taken from the disk."""
    plan = plan_for("random")
    suite = write_suite(tmp_path, aggregate=aggregate)
    whole_engine = engine(lambda recipe, prompt: 1 + bowl(recipe, prompt))
    whole = Lab(tmp_path / "whole", suite).study(plan, whole_engine)
    whole.run()
    lab, requests = Lab(tmp_path / "stopped", suite), 0
    for _ in range(3 * TRIALS):
        fake = engine(lambda recipe, prompt: 1 + bowl(recipe, prompt))
        study = lab.study(plan, fake)
        stop_before_recording(study, 4)
        try:
            study.run()
        except Stop:
            requests += fake.requests
            continue
        break
    assert history(study) == history(whole)
    assert requests + fake.requests == whole_engine.requests == sum(trial.items for trial in study.log)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.study.lab import Lab, engine
from tests.study.test_resume import plan_for, rough
place, at, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
lab = Lab(folder)
study = lab.study(plan_for("cma"), engine(rough))
if place == "engine":
    calls = iter(range(1, 10000))
    ask = study._recorder.book.engine.loglikelihood
    def loglikelihood(requests):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(requests)
    study._recorder.book.engine.loglikelihood = loglikelihood
else:  # half a line is on disk, and the journal's lock beside it
    calls = iter(range(1, 10000))
    fsync = os.fsync
    def half(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name == lab.location and next(calls) == at:
            os.truncate(name, os.path.getsize(name) - 100)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    os.fsync = half
study.run()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="finds the journal's descriptor in /proc")
def test_a_killed_process_loses_no_finished_trial_and_the_run_goes_on(tmp_path: Path):
    """SIGKILL inside the engine, and with half a trial written and Optuna's lock held."""
    plan = plan_for("cma")
    whole = Lab(tmp_path / "whole").study(plan, engine(rough))
    whole.run()
    lab = Lab(tmp_path / "killed")
    for place, at in (("engine", 12), ("journal", 20)):
        script = [sys.executable, "-c", KILLED, place, str(at), str(lab.folder)]
        died = subprocess.run(script, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
    assert os.path.lexists(lab.location + ".lock")
    study = lab.study(plan, engine(rough))
    assert len(study.log) > 20
    assert history(study) == history(whole)[: len(study.log)]
    study.run()
    assert history(study) == history(whole)
