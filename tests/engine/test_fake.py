"""The fake engine keeps the promises that callers of a real one rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evomerge.engine.base import Completion, Engine, GenerateRequest, Likelihood, LikelihoodRequest
from evomerge.engine.fake import FakeEngine
from evomerge.errors import EngineError, RecipeError
from evomerge.recipe import Cell, Recipe, Setting

FIRST = Recipe("base", ("math",), {})
SECOND = Recipe(
    "base", ("math",), {Cell(0, "mlp"): Setting("task_arithmetic", {}, {"math": {"weight": 0.5}})}
)


def echo(recipe, request):
    return f"{len(recipe.cells)} {request.prompt}"


def test_completions_depend_on_recipe_and_request():
    engine: Engine = FakeEngine(echo)
    requests = [GenerateRequest("a", 5), GenerateRequest("b", 5)]
    engine.load(FIRST)
    assert [completion.text for completion in engine.generate(requests)] == ["0 a", "0 b"]
    engine.load(SECOND)
    assert [completion.text for completion in engine.generate(requests)] == ["1 a", "1 b"]


@pytest.mark.parametrize(
    ("text", "max_tokens", "stop", "completion"),
    [
        ("one two", 5, (), Completion("one two", 2, "stop")),
        (" one  two three", 2, (), Completion(" one  two", 2, "length")),
        ("one\ntwo", 5, ("\n",), Completion("one", 1, "stop")),
        ("a b;c.d", 5, (".", ";"), Completion("a b", 2, "stop")),
        ("", 5, (), Completion("", 0, "stop")),
    ],
)
def test_completions_are_cut_at_stop_texts_and_length(text, max_tokens, stop, completion):
    engine = FakeEngine(lambda recipe, request: text)
    engine.load(FIRST)
    assert engine.generate([GenerateRequest("", max_tokens, stop=stop)]) == [completion]


def test_likelihoods_come_from_the_function_given():
    engine = FakeEngine(echo, lambda recipe, request: -2.5 * len(request.prompt))
    engine.load(FIRST)
    assert engine.loglikelihood([LikelihoodRequest("ab", "c d e")]) == [Likelihood(-5.0, 3)]


def test_fingerprints_tell_recipes_apart():
    engine = FakeEngine(echo)
    one, again, other = (engine.load(recipe).fingerprint for recipe in (FIRST, FIRST, SECOND))
    assert one == again != other


@pytest.mark.parametrize("error", [EngineError("worker died"), RecipeError("not finite")])
def test_the_chosen_load_fails_and_the_next_one_works(error):
    engine = FakeEngine(echo, fail_at={2: error})
    engine.load(FIRST)
    with pytest.raises(type(error), match=str(error)):
        engine.load(SECOND)
    with pytest.raises(EngineError, match="holds no recipe"):
        engine.generate([GenerateRequest("a", 1)])
    engine.load(SECOND)
    assert (engine.loads, engine.recipe) == (3, SECOND)


def test_nothing_is_answered_before_a_load_or_after_close():
    engine = FakeEngine(echo)
    with pytest.raises(EngineError, match="call `load` first"):
        engine.loglikelihood([LikelihoodRequest("a", "b")])
    engine.load(FIRST)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="holds no recipe"):
        engine.generate([GenerateRequest("a", 1)])
    with pytest.raises(EngineError, match="closed"):
        engine.load(FIRST)


def test_calls_and_requests_are_counted():
    engine = FakeEngine(echo)
    engine.load(FIRST)
    engine.generate([GenerateRequest("a", 1)] * 3)
    engine.loglikelihood([LikelihoodRequest("a", "b")] * 2)
    assert (engine.loads, engine.generate_calls, engine.likelihood_calls, engine.requests) == (1, 1, 1, 5)


def test_evaluation_and_the_fake_engine_load_no_torch():
    code = (
        "import sys, evomerge.engine.fake, evomerge.evaluate.evaluator, evomerge.evaluate.records\n"
        "assert not {'torch', 'vllm', 'transformers', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
