"""The winner is chosen on fresh items and proved on held-out ones, each asked once."""

from __future__ import annotations

import pytest

from evomerge.errors import EngineError, HeldOutError, RecipeError
from evomerge.study.final import Final
from tests.study.lab import FIXED_RECIPES, Lab, engine, plan, weights, write_suite

LABELS = [fixed.label for fixed in FIXED_RECIPES]
TRIALS = len(LABELS) + 30


def overfit(recipe, prompt):
    """Calibration has its optimum at (1.2, 1.2); fresh items like (0.5, 0.5), the uniform average."""
    found = weights(recipe)
    best = 1.2 if "calibration" in prompt else 0.5
    return 1 - (found["math"] - best) ** 2 - (found["code"] - best) ** 2 + 0.1 * int(prompt[-1])


def real(recipe, prompt):
    """The same optimum at (0.2, 0.9) everywhere: no fixed recipe is near."""
    found = weights(recipe)
    return 1 - (found["math"] - 0.2) ** 2 - (found["code"] - 0.9) ** 2 + 0.1 * int(prompt[-1])


def finish(lab, fake, top=2, said=None, **fields):
    study = lab.study(plan(TRIALS, optimizer="cma", **fields), fake)
    study.run()
    return Final(study, study._recorder.book, top=top, progress=(said if said is not None else []).append)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, write_suite(tmp_path, n=5))


def test_a_recipe_that_only_calibration_likes_is_rejected_on_selection(lab):
    final = finish(lab, engine(overfit))
    assert final.finalists()[1].calibration > final.finalists()[0].calibration  # found beats fixed there
    result = final.run()
    assert result.winner.kind == "fixed"
    assert result.winner.selection.value == max(
        e.selection.value for e in result.entries if e.selection is not None
    )


def test_a_recipe_that_is_better_everywhere_wins_and_leads_significantly(lab):
    result = finish(lab, engine(real)).run()
    assert result.winner.kind == "search"
    assert result.winner.lead is None
    assert [entry.kind for entry, _ in result.rivals] == ["source", "fixed"]
    assert all(lead.significant for _, lead in result.rivals)


def test_leads_are_differences_of_held_out_fitness(lab):
    result = finish(lab, engine(real)).run()
    for entry in result.entries[1:]:
        difference = result.winner.held_out.value - entry.held_out.value
        assert entry.lead.difference == pytest.approx(difference)
        assert entry.lead.low <= entry.lead.difference <= entry.lead.high


def test_every_source_and_fixed_recipe_is_compared_once(lab):
    result = finish(lab, engine(real)).run()
    assert sorted(e.label for e in result.entries[1:]) == sorted(LABELS)
    values = [e.held_out.value for e in result.entries[1:]]
    assert values == sorted(values, reverse=True)
    assert result.items == {"calibration": 5, "selection": 5, "held_out": 5}


def test_a_fixed_recipe_that_wins_is_no_rival_of_itself(lab):
    result = finish(lab, engine(overfit)).run()
    assert sorted(e.label for e in result.entries) == sorted(LABELS)


def test_finalists_are_the_best_fixed_recipe_and_the_top_few_found_by_calibration(lab):
    final = finish(lab, engine(real), top=3)
    fixed = {f.recipe.digest for f in FIXED_RECIPES}
    trials = sorted(
        (t for t in final._study.log if t.stage != "fixed" and t.digest not in fixed), key=lambda t: -t.told
    )
    finalists = final.finalists()
    assert finalists[0].label == "code"
    assert [e.label for e in finalists[1:]] == [f"trial {t.number}" for t in trials[:3]]
    assert len({e.recipe.digest for e in finalists}) == 4


def test_among_equals_the_fixed_recipe_wins(lab):
    result = finish(lab, engine(lambda recipe, prompt: float(prompt[-1]))).run()
    assert result.winner.label == LABELS[0]


def test_only_the_winner_and_the_fixed_recipes_meet_the_held_out_items(lab):
    asked = []

    def fitness(recipe, prompt):
        if "held_out" in prompt:
            asked.append((recipe.digest, prompt))
        return real(recipe, prompt)

    result = finish(lab, engine(fitness)).run()
    assert len(asked) == len(set(asked)) == 5 * len(result.entries)
    assert {digest for digest, _ in asked} == {e.recipe.digest for e in result.entries}


def test_held_out_items_are_sealed_again_afterwards(lab):
    final = finish(lab, engine(real))
    final.run()
    with pytest.raises(HeldOutError):
        final._suite.items("words", "held_out")


class Stop(BaseException):
    """An interruption that nothing catches."""


def test_an_interrupted_end_goes_on_and_asks_nothing_twice(lab, tmp_path):
    whole_engine = engine(real)
    whole = finish(Lab(tmp_path / "whole", lab.suite_path), whole_engine).run()
    asked, result = 0, None
    for _ in range(40):
        fake = engine(real)
        final = finish(lab, fake)
        store = final._book.store
        write, calls = store.write, iter(range(100))

        def stopping(key, scores, write=write, calls=calls):
            path = write(key, scores)
            if next(calls) == 1:
                raise Stop
            return path

        store.write = stopping
        try:
            result = final.run()
        except Stop:
            asked += fake.requests
            continue
        asked += fake.requests
        break
    assert result == whole
    assert asked == whole_engine.requests


def test_the_end_of_a_finished_run_can_be_made_again_without_the_engine(lab):
    first = finish(lab, engine(real)).run()
    fake = engine(real)
    assert finish(lab, fake).run() == first
    assert fake.loads == 0


def test_a_machine_that_fails_at_the_end_says_how_to_go_on(lab):
    final = finish(lab, engine(real))
    error = EngineError("out of memory")
    loads = final._book.engine.loads
    final._book.engine._fail_at = {loads + 2: error, loads + 3: error}
    with pytest.raises(EngineError, match=r"not be scored on the selection items: out of memory.*resume"):
        final.run()
    assert final.run().winner.kind == "search"


def test_a_fixed_recipe_that_is_infeasible_is_left_out(lab):
    def fitness(recipe, prompt):
        if recipe == FIXED_RECIPES[-1].recipe:
            raise RecipeError("not finite")
        return real(recipe, prompt)

    said = []
    result = finish(lab, engine(fitness), said=said).run()
    assert sorted(e.label for e in result.entries[1:]) == sorted(LABELS[:-1])
    assert f"held-out: {LABELS[-1]} not finite" in said


def test_a_finalist_that_is_infeasible_on_fresh_items_cannot_win(lab):
    def fitness(recipe, prompt):
        fixed = any(recipe == f.recipe for f in FIXED_RECIPES)
        if "selection" in prompt and not fixed:
            raise RecipeError("not finite")
        return real(recipe, prompt)

    assert finish(lab, engine(fitness)).run().winner.label == "code"


def test_a_fixed_recipe_scored_on_part_of_the_items_has_no_calibration_fitness(lab):
    result = finish(lab, engine(real), screen=2, promote=1).run()
    calibration = {e.label: e.calibration for e in result.entries}
    assert None in calibration.values()
    assert all(calibration[label] is not None for label in ("base", "math", "code"))


def test_normalized_fitness_is_relative_to_the_best_source(tmp_path):
    lab = Lab(tmp_path, write_suite(tmp_path, n=5, aggregate="normalized"))
    result = finish(lab, engine(real)).run()
    best = max(e.tasks["words"].mean for e in result.entries if e.kind == "source")
    calibration_best = result.winner.held_out.value / result.winner.tasks["words"].mean
    assert calibration_best == pytest.approx(1 / best)  # `real` scores alike on all splits
