"""The evaluator with a fake engine: what is asked, how answers find their items."""

from __future__ import annotations

import dataclasses
import math

import pytest

from evomerge.engine.base import Completion
from evomerge.engine.fake import FakeEngine
from evomerge.errors import EngineError, FitnessError, HeldOutError, RecipeError
from evomerge.evaluate.evaluator import evaluate, subset
from evomerge.evaluate.task import Suite
from evomerge.recipe import Recipe

RECIPE = Recipe("base", ("math",), {})


def loaded(answer=lambda recipe, request: "0", likelihood=None):
    engine = FakeEngine(answer, likelihood)
    engine.load(RECIPE)
    return engine


def test_answers_find_their_items_in_any_order(write_suite):
    suite = Suite.load(write_suite())
    items = subset(suite, "calibration")[::-1]
    engine = loaded(lambda recipe, request: request.prompt.split()[2][0])  # "math calibration 2?..." -> "2"
    scores = evaluate(engine, suite, items)
    assert [(score.task, score.item) for score in scores] == [(item.task, item.id) for item in items]
    assert [score.completion for score in scores] == [item.answer for item in items]
    assert all(score.value == 1 and score.tokens == 1 for score in scores)


def test_all_generation_items_of_all_tasks_go_into_one_call(write_suite):
    engine, suite = loaded(), Suite.load(write_suite())
    evaluate(engine, suite, subset(suite, "selection"))
    assert (engine.generate_calls, engine.likelihood_calls, engine.requests) == (1, 0, 6)


def test_the_task_settings_reach_the_request(write_suite):
    seen = []
    path = write_suite(chat=True, system="Be brief.", max_tokens=8, stop=["\n"])
    suite = Suite.load(path)
    engine = loaded(lambda recipe, request: seen.append(request) or "1")
    evaluate(engine, suite, subset(suite, "calibration", 1))
    request = seen[0]
    assert request.prompt == "math calibration 0?\nAnswer:"
    assert (request.chat, request.system, request.max_tokens, request.stop) == (True, "Be brief.", 8, ("\n",))


@pytest.fixture
def choice_rows(rows):
    return [{**row, "choices": ["0", "1", "2"]} for row in rows("math")]


def test_a_choice_item_is_one_likelihood_request_per_choice(write_suite, choice_rows):
    suite = Suite.load(write_suite({"math": choice_rows}, scorer="choice"))
    seen = []

    def prefers_one(recipe, request):
        seen.append(request)
        return 0.0 if request.continuation.strip() == "1" else -5.0

    engine = loaded(likelihood=prefers_one)
    scores = evaluate(engine, suite, subset(suite, "calibration"))
    assert [score.value for score in scores] == [0, 1, 0]
    assert [score.completion for score in scores] == ["1", "1", "1"]
    assert (engine.likelihood_calls, engine.generate_calls, len(seen)) == (1, 0, 9)


@pytest.mark.parametrize(
    ("prompt", "chat", "prefix", "continuation"),
    [
        ("{{ question }}", False, None, " 0"),
        ("{{ question }} ", False, None, "0"),
        ("{{ question }}\n", False, None, "0"),
        ("{{ question }}", True, None, "0"),
        ("{{ question }}", True, " ", " 0"),
        ("{{ question }}", False, "", "0"),
        ("", False, None, "0"),
    ],
)
def test_a_space_joins_prompt_and_reference_where_there_is_none(
    write_suite, rows, prompt, chat, prefix, continuation
):
    seen = []
    data = [{**row, "answer": f"{i}"} for i, row in enumerate(rows("math"))]
    scorer = {"type": "nll", "prefix": prefix}
    suite = Suite.load(write_suite({"math": data}, prompt=prompt, chat=chat, scorer=scorer))
    engine = loaded(likelihood=lambda recipe, request: seen.append(request) or -1.0)
    evaluate(engine, suite, subset(suite, "calibration", 1))
    assert seen[0].continuation == continuation


def test_generation_and_likelihood_tasks_mix(write_suite, choice_rows, rows, tmp_path):
    path = write_suite({"pick": choice_rows, "math": rows("maths")}, scorer="choice")
    path.write_text(path.read_text().replace("scorer: choice", "scorer: numeric", 1))  # "math" comes first
    suite = Suite.load(path)
    items = [
        item
        for pair in zip(subset(suite, "calibration")[:3], subset(suite, "calibration")[3:], strict=True)
        for item in pair
    ]
    engine = loaded(lambda recipe, request: "2", lambda recipe, request: -float(request.continuation))
    scores = evaluate(engine, suite, items)
    assert [score.value for score in scores] == [0, 1, 0, 0, 1, 0]
    assert (engine.generate_calls, engine.likelihood_calls) == (1, 1)


@pytest.mark.parametrize(("scorer", "total"), [("nll", math.nan), ("nll", -math.inf), ("choice", math.nan)])
def test_a_likelihood_that_is_no_number_makes_the_recipe_infeasible(write_suite, choice_rows, scorer, total):
    suite = Suite.load(write_suite({"math": choice_rows}, scorer=scorer))
    engine = loaded(likelihood=lambda recipe, request: total)
    with pytest.raises(RecipeError, match=r"item `math-calibration-0`: log-likelihoods are (nan|-inf)"):
        evaluate(engine, suite, subset(suite, "calibration"))


def test_an_engine_that_loses_answers_is_an_engine_error(write_suite):
    class Lossy(FakeEngine):
        def generate(self, requests):
            return super().generate(requests)[1:]

    suite, engine = Suite.load(write_suite()), Lossy(lambda recipe, request: "1")
    engine.load(RECIPE)
    with pytest.raises(EngineError, match="returned 5 completions for 6 requests"):
        evaluate(engine, suite, subset(suite, "calibration"))


def test_an_item_of_another_suite_is_refused(write_suite):
    suite = Suite.load(write_suite())
    stranger = dataclasses.replace(subset(suite, "calibration")[0], task="maths")
    with pytest.raises(
        FitnessError, match=r"task `maths`, which the suite has not got; did you mean `math`\?"
    ):
        evaluate(loaded(), suite, [stranger])


def test_no_items_ask_nothing(write_suite):
    engine, suite = loaded(), Suite.load(write_suite())
    assert evaluate(engine, suite, []) == []
    assert engine.generate_calls == 0


def test_a_completion_is_evidence_even_when_it_is_wrong(write_suite):
    suite = Suite.load(write_suite())
    score = evaluate(loaded(lambda recipe, request: "no idea"), suite, subset(suite, "calibration", 1))[0]
    assert (score.value, score.completion, score.tokens) == (0, Completion("no idea", 2, "stop").text, 2)


def test_a_subset_is_the_first_items_of_each_task(write_suite):
    suite = Suite.load(write_suite())
    assert [item.id for item in subset(suite, "selection", 2)] == [
        "math-selection-0", "math-selection-1", "words-selection-0", "words-selection-1",
    ]  # fmt: skip
    assert len(subset(suite, "selection")) == len(subset(suite, "selection", 100)) == 6


def test_a_subset_of_held_out_items_is_sealed(write_suite):
    suite = Suite.load(write_suite())
    with pytest.raises(HeldOutError):
        subset(suite, "held_out")
    with suite.unsealed():
        assert len(subset(suite, "held_out", 1)) == 2


def test_an_empty_subset_is_refused(write_suite):
    with pytest.raises(FitnessError, match="0 items per task were asked for"):
        subset(Suite.load(write_suite()), "calibration", 0)
