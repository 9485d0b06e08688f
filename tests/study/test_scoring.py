"""The scorebook: no item of a recipe twice, and failures as outcomes."""

from __future__ import annotations

import pytest

from evomerge.errors import EngineError, FitnessError, RecipeError, StorageError
from evomerge.evaluate.evaluator import subset
from evomerge.evaluate.records import ItemStore
from evomerge.evaluate.task import Suite
from evomerge.study.scoring import Scorebook
from evomerge.study.trial import Outcome, Trial
from tests.study.lab import FIXED_RECIPES, bowl, engine, write_suite

RECIPE = FIXED_RECIPES[1].recipe


class Desk:
    """A scorebook in a folder; made twice over one folder, it is a second process."""

    def __init__(self, folder, fitness=bowl, **fields):
        self.suite = Suite.load(folder / "suite.yaml")
        self.engine = engine(fitness, **fields)
        self.warnings = []
        self.store = ItemStore(folder / "items")
        self.book = Scorebook(self.engine, self.suite, self.store, self.warnings.append)

    def score(self, per_task=None, prefix="calibration/000000-", recipe=RECIPE):
        return self.book.score(recipe, subset(self.suite, "calibration", per_task), prefix)


@pytest.fixture
def folder(tmp_path):
    write_suite(tmp_path)
    return tmp_path


def test_scores_come_in_the_order_of_the_items_and_are_written(folder):
    desk = Desk(folder, lambda recipe, prompt: float(prompt[-1]))
    scored = desk.score()
    assert [round(score.value, 9) for score in scored.scores] == [0.0, 1.0, 2.0]
    assert (scored.outcome, scored.items, scored.digest) == (Outcome.COMPLETE, 3, RECIPE.digest)
    assert scored.record == f"calibration/000000-{RECIPE.digest[:12]}"
    assert tuple(desk.store.read(scored.record)) == scored.scores


def test_after_a_part_only_the_rest_is_asked(folder):
    desk = Desk(folder)
    assert desk.score(2).items == 2
    scored = desk.score(prefix="calibration/000007-")
    assert (scored.items, len(scored.scores), desk.engine.requests) == (1, 3, 3)
    assert scored.record.startswith("calibration/000007-")


def test_a_recipe_that_is_known_is_not_even_loaded(folder):
    desk = Desk(folder)
    first, second = desk.score(), desk.score(prefix="calibration/000001-")
    assert second.scores == first.scores
    assert (second.items, second.record, desk.engine.loads) == (0, "", 1)


def test_another_process_is_told_what_is_known_by_the_trials(folder):
    scored = Desk(folder).score()
    later = Desk(folder)
    later.book.remember(Trial(0, "fixed", scored.outcome, scored.digest, record=scored.record))
    assert later.score(prefix="calibration/000001-").scores == scored.scores
    assert later.engine.requests == 0


def test_a_record_without_its_trial_counts_as_this_trials_answers(folder):
    scored = Desk(folder).score()
    later = Desk(folder)
    again = later.score()
    assert (again.scores, again.items, again.record) == (scored.scores, 3, scored.record)
    assert later.engine.requests == 0


def test_a_record_of_other_items_is_not_taken_for_an_answer(folder):
    Desk(folder).score(2)
    later = Desk(folder)
    assert len(later.score().scores) == 3
    assert later.engine.requests == 3


def test_a_machine_failure_is_tried_again(folder):
    desk = Desk(folder, fail_at={1: EngineError("out of memory")})
    assert desk.score().outcome is Outcome.COMPLETE
    assert len(desk.warnings) == 1
    assert "out of memory (try 1 of 2)" in desk.warnings[0]


def test_two_machine_failures_are_an_outcome(folder):
    desk = Desk(folder, fail_at={1: EngineError("first"), 2: EngineError("second")})
    scored = desk.score()
    assert (scored.outcome, scored.error, scored.scores, scored.items) == (Outcome.FAILED, "second", (), 0)
    assert desk.score().outcome is Outcome.COMPLETE  # nothing speaks against the recipe


def test_an_infeasible_recipe_is_an_outcome_and_is_not_tried_again(folder):
    desk = Desk(folder, fail_at={1: RecipeError("weights are not finite")})
    scored = desk.score()
    assert (scored.outcome, scored.error) == (Outcome.INFEASIBLE, "weights are not finite")
    assert desk.score(prefix="calibration/000001-").outcome is Outcome.INFEASIBLE
    assert desk.engine.loads == 1


def test_an_infeasible_recipe_stays_so_in_another_process(folder):
    desk = Desk(folder)
    desk.book.remember(Trial(0, "fixed", Outcome.INFEASIBLE, RECIPE.digest, error="not finite"))
    scored = desk.score()
    assert (scored.outcome, scored.error, desk.engine.loads) == (Outcome.INFEASIBLE, "not finite", 0)


def test_what_is_neither_the_recipes_nor_the_machines_fault_is_raised(folder):
    with pytest.raises(FitnessError):
        Desk(folder, fail_at={1: FitnessError("the scorer is wrong")}).score()


def test_a_damaged_record_is_refused(folder):
    desk = Desk(folder)
    scored = desk.score()
    desk.store.path(scored.record).write_bytes(b"nothing")
    with pytest.raises(StorageError, match="damaged"):
        desk.score()
