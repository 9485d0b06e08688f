"""The outer loop: fixed recipes first, stages from coarse to fine, budgets, failures, sealed items."""

from __future__ import annotations

import dataclasses
from itertools import groupby

import pytest

from evomerge.errors import ConfigError, EngineError, FitnessError, HeldOutError, RecipeError, StorageError
from evomerge.evaluate.task import Suite
from evomerge.study.budget import Budget
from evomerge.study.plan import Stage
from evomerge.study.study import MOST_IDLE, Observer, best_trial
from evomerge.study.trial import FIXED, Outcome
from tests.study.lab import FIXED_RECIPES, Lab, bowl, engine, plan, search_trials, space, weights, write_suite

LABELS = [fixed.label for fixed in FIXED_RECIPES]
SOURCES = LABELS[:3]  # base, math, code
MERGES = LABELS[3:]


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def run(lab, plan, fake=None, **fields):
    study = lab.study(plan, fake or engine(), **fields)
    study.run()
    return study


def watch_starts(study, monkeypatch):
    """The start that every stage is given, by its name."""
    starts, make = {}, study._start

    def watching(stage, before):
        starts[stage.name] = make(stage, before)
        return starts[stage.name]

    monkeypatch.setattr(study, "_start", watching)
    return starts


# The fixed recipes


def test_fixed_recipes_come_first_and_in_full_without_a_screen(lab):
    study = run(lab, plan(len(LABELS) + 4))
    assert [t.label for t in study.log if t.stage == FIXED] == LABELS
    assert all(t.outcome is Outcome.COMPLETE and t.items == 3 for t in study.log if t.stage == FIXED)
    assert [t.stage for t in study.log][-4:] == ["coarse", "coarse", "fine", "fine"]


def test_merges_are_screened_on_part_of_the_items_and_the_best_asked_the_rest_only(lab):
    study = run(lab, plan(0, screen=2, promote=1))
    fixed = {t.label: t for t in study.log if t.outcome is Outcome.PRUNED}
    assert list(fixed) == MERGES
    assert {t.items for t in fixed.values()} == {2}
    assert {t.told for t in fixed.values()} == {None}
    best = max(fixed.values(), key=lambda t: t.fitness)
    last = study.log.trials[-1]
    assert (last.label, last.outcome, last.items) == (best.label, Outcome.COMPLETE, 1)
    assert last.scores["words"].n == 3


def test_a_screen_of_all_items_is_no_screen(lab):
    study = run(lab, plan(0, screen=3, promote=1))
    assert [t.outcome for t in study.log] == [Outcome.COMPLETE] * len(LABELS)


def test_a_budget_smaller_than_the_fixed_recipes_need_leaves_no_search(lab):
    study = lab.study(plan(2), engine())
    assert study.run() == best_trial(study.log)
    assert [t.label for t in study.log] == LABELS


def test_a_fixed_recipe_that_the_search_proposes_costs_no_item(lab):
    """Every fixed recipe is at hand as a known point; asked for again, it is answered from the records."""
    study = run(lab, plan(0))
    stage = study.plan.stages[0]
    proposals = [stage.space.encode(f.recipe) for f in FIXED_RECIPES if f.label.startswith("task")]
    fake = engine()
    study = lab.study(plan(0), fake)
    for params in proposals:
        recipe = stage.space.decode(params)
        scored = study._recorder.score(recipe, study._recorder.items)
        assert (scored.outcome, scored.items) == (Outcome.COMPLETE, 0)
    assert fake.requests == 0


def test_fixed_recipes_are_the_optimizers_warm_start(lab, monkeypatch):
    """All that the space can say exactly are known points; the best one is where the search begins."""
    starts = {}
    study = lab.study(plan(len(LABELS) + 2, optimizer="cma"), engine())
    make = study._start
    monkeypatch.setattr(
        study, "_start", lambda stage, before: starts.setdefault(stage.name, make(stage, before))
    )
    study.run()
    assert starts.keys() == {"coarse", "fine"}
    known = {tuple(params.values()): fitness for params, fitness in starts["coarse"].known}
    assert len(known) == len(starts["coarse"].known)  # not ties or linear, which read as weights by mistake
    told = {t.label: t.told for t in study.log if t.stage == FIXED}
    assert known == {
        (0.0, 0.0): told["base"],
        (1.0, 0.0): told["math"],
        (0.0, 1.0): told["code"],
        (0.5, 0.5): told["uniform average"],
        (1.0, 1.0): told["task arithmetic 1"],
    }
    best = best_trial(t for t in study.log if t.stage == FIXED)
    assert tuple(starts["coarse"].params.values()) == max(known, key=known.get)
    assert known[tuple(starts["coarse"].params.values())] == best.told


# Stages and budgets


def test_every_stage_starts_at_the_incumbent_of_the_one_before_in_its_finer_space(lab, monkeypatch):
    starts = {}
    study = lab.study(plan(len(LABELS) + 40), engine())
    make = study._start
    monkeypatch.setattr(
        study, "_start", lambda stage, before: starts.setdefault(stage.name, make(stage, before))
    )
    study.run()
    coarse = best_trial(t for t in study.log if t.stage != "fine")
    fine = study.plan.stages[1]
    assert starts["fine"].sigma == fine.sigma
    assert fine.space.decode(starts["fine"].params).digest == coarse.digest
    assert (dict(starts["fine"].params), coarse.told) in [(dict(p), f) for p, f in starts["fine"].known]


def test_stages_take_their_share_of_what_the_fixed_recipes_left(lab):
    stages = (
        Stage("one", space(), 0.2, 0.25),
        Stage("two", space(), 0.1, 0.5),
        Stage("three", space(layers={"blocks": 2}), 0.1, 1.0),
    )
    study = run(lab, plan(len(LABELS) + 20, stages=stages))
    assert [(name, len(list(g))) for name, g in groupby(t.stage for t in search_trials(study))] == [
        ("one", 5),
        ("two", 5),
        ("three", 10),
    ]


def test_a_budget_of_items_ends_the_search(lab):
    study = run(lab, plan(budget=Budget(items=3 * len(LABELS) + 30)))
    assert study.spent.items == 3 * len(LABELS) + 30
    assert study.share_used == 1.0


def test_a_budget_of_time_ends_the_search_and_keeps_time_for_the_end(lab):
    """A candidate takes 1.5 seconds; 12 of 100 are kept back, and the 7 fixed recipes take 10.5."""
    now = [0.0]

    def fitness(recipe, prompt):
        now[0] += 0.5
        return bowl(recipe, prompt)

    budget = Budget(seconds=100.0)
    study = run(lab, plan(budget=budget, reserve=lambda each: 12.0), engine(fitness), clock=lambda: now[0])
    assert study.log.trials[len(LABELS) - 1].elapsed == 10.5
    assert 88.0 <= study.log.trials[-1].elapsed < 89.5
    assert [t.stage for t in study.log].count("coarse") == 26  # 77.5 s are left; 26 * 1.5 is past half


def test_the_clock_of_a_run_stands_still_between_processes(lab):
    now = [5.0]
    run(lab, plan(len(LABELS)), clock=lambda: now[0])
    study = lab.study(plan(len(LABELS)), engine())
    assert study.clock() == pytest.approx(5.0, abs=0.5)


def test_the_running_totals_are_those_of_the_log(lab):
    study = run(lab, plan(len(LABELS) + 12, screen=2))
    work = sum(t.merge_seconds + t.evaluate_seconds for t in study.log)
    assert study.spent.trials == len(study.log)
    assert study.spent.items == sum(t.items for t in study.log)
    assert study.seconds_per_item == pytest.approx(work / study.spent.items)
    assert study.incumbent == best_trial(study.log)
    later = lab.study(plan(len(LABELS) + 12, screen=2), engine())
    assert later._totals == study._totals


def test_among_equals_the_earliest_is_the_incumbent(lab):
    study = run(lab, plan(len(LABELS) + 4), engine(lambda recipe, prompt: 0.25))
    assert study.incumbent == study.best == best_trial(study.log) == study.log.trials[0]


def test_the_search_finds_the_optimum(lab):
    study = run(lab, plan(len(LABELS) + 80, optimizer="cma"))
    found = weights(study.recipe_of(study.incumbent))
    assert found == pytest.approx({"math": 0.3, "code": 0.8}, abs=0.1)


def test_a_stage_that_finds_nothing_new_gives_way(lab):
    """All proposals are infeasible and cost no item: a budget of items would never end."""
    infeasible = space(methods=["slerp"], parameters={"weight": {"low": -1.0, "high": -0.5}})
    stages = (Stage("coarse", infeasible, 0.2, 0.5), Stage("fine", space(), 0.1, 1.0))
    study = run(lab, plan(stages=stages, budget=Budget(items=3 * len(LABELS) + 12)))
    assert [t.stage for t in study.log].count("coarse") == MOST_IDLE
    assert [t.stage for t in study.log].count("fine") == 4
    assert lab.warnings == [f"coarse: {MOST_IDLE} proposals in a row were known; it ends here"]


def test_stages_with_one_name_or_different_choices_are_refused(lab):
    with pytest.raises(ConfigError, match="two stages are named `one`"):
        plan(9, stages=(Stage("one", space(), 0.2, 0.5), Stage("one", space(), 0.2, 1.0)))
    few, more = (space(methods=m) for m in (["linear", "ties"], ["linear", "ties", "task_arithmetic"]))
    with pytest.raises(ConfigError, match=r"`all.method` has the choices .* give both stages the same"):
        plan(9, stages=(Stage("one", few, 0.2, 0.5), Stage("two", more, 0.2, 1.0)))


# Failures are outcomes


class Failing:
    """Raises `error` at the loads that `fails` picks, by number from 1."""

    def __init__(self, error, fails):
        self.fake = engine()
        self.error, self.fails, self.loads = error, fails, 0
        load = self.fake.load

        def loading(recipe):
            self.loads += 1
            if self.fails(self.loads):
                raise self.error
            return load(recipe)

        self.fake.load = loading


def test_one_machine_failure_is_no_outcome(lab):
    study = run(lab, plan(len(LABELS) + 4), engine(fail_at={9: EngineError("out of memory")}))
    assert {t.outcome for t in study.log} == {Outcome.COMPLETE}
    assert len(lab.warnings) == 1


@pytest.mark.parametrize("name", ["cma", "mixed", "tpe", "random"])
def test_two_machine_failures_are_a_failed_trial_and_the_study_goes_on(lab, name):
    at = len(LABELS) + 2
    error = EngineError("out of memory")
    study = run(lab, plan(len(LABELS) + 12, optimizer=name), engine(fail_at={at: error, at + 1: error}))
    failed = study.log.trials[at - 1]
    assert (failed.outcome, failed.error, failed.told) == (Outcome.FAILED, "out of memory", None)
    assert len(study.log) == len(LABELS) + 12


@pytest.mark.parametrize("name", ["cma", "mixed", "tpe", "random"])
def test_an_infeasible_recipe_is_an_outcome_and_the_study_goes_on(lab, name):
    at = len(LABELS) + 2
    fake = engine(fail_at={at: RecipeError("weights are not finite")})
    study = run(lab, plan(len(LABELS) + 12, optimizer=name), fake)
    assert study.log.trials[at - 1].outcome is Outcome.INFEASIBLE
    assert len(study.log) == len(LABELS) + 12


def test_parameters_without_a_recipe_are_infeasible_and_need_no_engine(lab):
    slerp = space(methods=["slerp"], parameters={"weight": {"low": -1.0, "high": 1.0}})
    study = run(lab, plan(len(LABELS) + 20, stages=(Stage("one", slerp, 0.2, 1.0),)))
    infeasible = [t for t in study.log if t.outcome is Outcome.INFEASIBLE]
    assert infeasible
    assert all("slerp needs two models" in t.error and t.items == 0 for t in infeasible)


def test_a_machine_that_fails_again_and_again_ends_the_run_and_a_resume_goes_on(lab):
    broken = Failing(EngineError("no device"), lambda load: load > len(LABELS) + 3)
    with pytest.raises(EngineError, match=r"the last 5 trials failed.*no device.*`evomerge resume`"):
        lab.study(plan(len(LABELS) + 20), broken.fake).run()
    study = lab.study(plan(len(LABELS) + 20), engine())
    assert [t.outcome for t in study.log][-6:] == [Outcome.COMPLETE] + [Outcome.FAILED] * 5
    study.run()
    assert len(study.log) == len(LABELS) + 20
    assert {t.outcome for t in study.log.trials[-12:]} == {Outcome.COMPLETE}


def test_fixed_recipes_that_failed_are_tried_again_after_the_others(lab):
    error = EngineError("out of memory")
    study = run(lab, plan(0, screen=2, promote=1), engine(fail_at=dict.fromkeys([2, 3, 6, 7], error)))
    outcomes = [(t.label, t.outcome) for t in study.log]
    assert outcomes[1] == ("math", Outcome.FAILED)
    assert outcomes[-2:] == [("math", Outcome.COMPLETE), (MERGES[1], Outcome.COMPLETE)]


def test_a_fixed_recipe_that_the_machine_cannot_merge_is_given_up(lab):
    def fitness(recipe, prompt):
        if recipe == FIXED_RECIPES[-1].recipe:
            raise EngineError("out of memory")
        return bowl(recipe, prompt)

    study = run(lab, plan(len(LABELS) + 6), engine(fitness))
    assert [t.outcome for t in study.log if t.label == LABELS[-1]] == [Outcome.FAILED] * 2
    assert len(search_trials(study)) == 5


def test_a_machine_that_is_broken_from_the_start_can_be_mended(lab):
    broken = Failing(EngineError("no device"), lambda load: True)
    for _ in range(3):
        with pytest.raises(EngineError, match="trials failed"):
            lab.study(plan(60), broken.fake).run()
    study = run(lab, plan(60))
    assert {t.label for t in study.log if t.outcome is Outcome.COMPLETE} >= set(LABELS)
    assert search_trials(study)


def test_no_feasible_fixed_recipe_at_all_is_an_error(lab):
    broken = Failing(RecipeError("not finite"), lambda load: True)
    with pytest.raises(EngineError, match="none of the fixed recipes could be scored"):
        lab.study(plan(60), broken.fake).run()


def test_a_trial_that_cannot_be_recorded_ends_the_run(lab, monkeypatch):
    study = lab.study(plan(60), engine())

    def full(*arguments):
        raise StorageError("no space left")

    monkeypatch.setattr(study.log, "add", full)
    with pytest.raises(StorageError, match="no space left"):
        study.run()


# Items


def test_the_search_never_reads_held_out_or_selection_items(lab, monkeypatch):
    """Promise 3: any access raises, and the search succeeds."""
    items = Suite.items

    def reading(self, task, split):
        if split != "calibration":
            raise HeldOutError(f"{split} items were read")
        return items(self, task, split)

    monkeypatch.setattr(Suite, "items", reading)
    prompts = []
    fake = engine(lambda recipe, prompt: prompts.append(prompt) or bowl(recipe, prompt))
    study = run(lab, plan(len(LABELS) + 12, screen=2), fake)
    assert len(search_trials(study)) > 0
    assert {prompt.split()[1] for prompt in prompts} == {"calibration"}


def test_too_few_items_for_an_interval_are_found_before_the_night(tmp_path):
    lab = Lab(tmp_path, write_suite(tmp_path, n=1))
    with pytest.raises(FitnessError, match="task `words` has 1 calibration items, but an interval needs"):
        lab.study(plan(5), engine())


def test_items_and_completions_of_every_trial_are_on_disk(lab):
    study = run(lab, plan(len(LABELS) + 4))
    for trial in study.log:
        scores = study._recorder.book.store.read(trial.record)
        assert [score.item for score in scores] == [f"calibration-{i}" for i in range(3)]


def test_the_same_recipe_is_never_evaluated_twice(lab):
    """A budget of one space, twice: the second stage begins at recipes that the first one asked."""
    asked = []
    fake = engine(lambda recipe, prompt: asked.append((recipe.digest, prompt)) or bowl(recipe, prompt))
    run(lab, plan(len(LABELS) + 40, optimizer="cma", screen=1, promote=2), fake)
    assert len(asked) == len(set(asked))


# The normalized aggregate


def two_tasks(recipe, prompt):
    """`hard` scores a tenth of `easy`; a source is good at one of them."""
    found = weights(recipe)
    return 0.1 + found["math"] if prompt.startswith("easy") else 0.01 + found["code"] / 10


def test_normalized_fitness_divides_by_the_best_source_in_every_trial(tmp_path):
    """Base and math are recorded with the scores of code, which is asked last, already known."""
    suite = write_suite(tmp_path, {"easy": "nll", "hard": "nll"}, aggregate="normalized")
    study = run(Lab(tmp_path, suite), plan(len(LABELS) + 4, screen=2), engine(two_tasks))
    for trial in study.log:
        easy, hard = trial.scores["easy"].mean, trial.scores["hard"].mean
        assert trial.fitness == pytest.approx((easy / 1.1 + hard / 0.11) / 2)
    assert study.best_source == pytest.approx({"easy": 1.1, "hard": 0.11})


def test_normalized_needs_every_source_and_says_which_one_failed(tmp_path):
    lab = Lab(tmp_path, write_suite(tmp_path, aggregate="normalized"))
    error = EngineError("out of memory")
    with pytest.raises(EngineError, match=r"`code` was not scored, but `normalized` needs every source"):
        lab.study(plan(9), engine(fail_at={3: error, 4: error})).run()
    fake = engine()
    study = run(lab, plan(9), fake)
    assert [t.label for t in study.log][:3] == SOURCES
    assert [t.items for t in study.log][:3] == [3, 3, 3]
    assert fake.requests == study.spent.items - 2 * 3  # base and math were asked before


# Observers


def test_an_observer_sees_every_stage_and_every_trial(lab):
    seen = []

    class Watch(Observer):
        def begin(self, study, stage):
            seen.append(stage)

        def trial(self, study, trial):
            assert study.log.trials[-1] == trial
            seen.append(trial.number)

    run(lab, plan(len(LABELS) + 4), observer=Watch())
    n = len(LABELS)
    assert seen == ["fixed", *range(n), "coarse", n, n + 1, "fine", n + 2, n + 3]


def test_trials_are_frozen(lab):
    trial = run(lab, plan(0)).log.trials[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        trial.fitness = 1.0
