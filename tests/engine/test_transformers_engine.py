"""The transformers engine on tiny real models: what it holds, what it answers, when it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from evomerge.build import family_of
from evomerge.engine.base import GenerateRequest, LikelihoodRequest
from evomerge.engine.factory import transformers_engine
from evomerge.engine.transformers_engine import Draws, TransformersEngine
from evomerge.errors import EngineError, RecipeError
from evomerge.recipe import Recipe, Setting
from evomerge.sources.source_set import SourceSet
from tests.tiny import tiny_family

PROMPTS = ["a b c", "a", "d e f g h i j k", "b b", "c a d"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    return tiny_family(tmp_path_factory.mktemp("sources"), torch.float32)


@pytest.fixture
def engine(sources: SourceSet) -> TransformersEngine:
    made = transformers_engine(sources, sources.layout(), device="cpu", cache_gb=0.1)
    assert isinstance(made, TransformersEngine)
    return made


def everywhere(sources: SourceSet, method: str, **weights: float) -> Recipe:
    family = family_of(sources, sources.layout())
    setting = Setting(method, {}, {name: {"weight": weight} for name, weight in weights.items()})
    return family.recipe(dict.fromkeys(family.layout.by_cell, setting))


def model_logits(engine: TransformersEngine, prompt: str) -> torch.Tensor:
    """Next-token logits by a plain call of the model, without batch, padding or cache."""
    ids = engine.prompts.encode(GenerateRequest(prompt, 1))
    with torch.inference_mode():
        return engine.model(input_ids=torch.tensor([ids])).logits[0]


def test_a_source_alone_is_that_source(engine: TransformersEngine, sources: SourceSet):
    engine.load(everywhere(sources, "task_arithmetic", full=1.0))
    stored = load_file(sources.folders["full"] / "model.safetensors")
    for name, tensor in engine.tensors():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=2e-7)


def test_going_back_to_the_base_restores_it_exactly(engine: TransformersEngine, sources: SourceSet):
    before = {name: tensor.clone() for name, tensor in engine.tensors()}
    engine.load(everywhere(sources, "task_arithmetic", full=0.7, adapter=0.4))
    engine.load(Recipe("base", sources.models, {}))
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors())


def test_equal_recipes_have_equal_fingerprints_whatever_was_loaded_before(
    engine: TransformersEngine, sources: SourceSet
):
    one = engine.load(everywhere(sources, "task_arithmetic", full=0.7)).fingerprint
    other = engine.load(everywhere(sources, "task_arithmetic", full=0.6)).fingerprint
    assert engine.load(everywhere(sources, "task_arithmetic", full=0.7)).fingerprint == one
    assert other != one


def test_only_tensors_whose_operation_changed_are_written(engine: TransformersEngine, sources: SourceSet):
    recipe = everywhere(sources, "task_arithmetic", adapter=0.5)
    engine.load(recipe)
    assert engine.load(recipe).tensors == 0


def test_weights_that_did_not_arrive_are_noticed(
    engine: TransformersEngine, sources: SourceSet, monkeypatch: pytest.MonkeyPatch
):
    """A copy that does nothing for one tensor stands for any stale weight (promise 4)."""
    stale = "model.layers.1.mlp.up_proj.weight"
    kept = engine._weights[stale]

    class Stale:
        dtype = kept.dtype

        def copy_(self, tensor: torch.Tensor) -> None:
            """Lose the tensor."""

        def __getattr__(self, name: str) -> object:
            return getattr(kept, name)

    monkeypatch.setitem(engine._weights, stale, Stale())
    with pytest.raises(EngineError, match=f"tensor `{stale}`: the engine does not hold what was merged"):
        engine.load(everywhere(sources, "task_arithmetic", full=0.7))


def test_weights_that_are_not_finite_are_the_recipes_fault(engine: TransformersEngine, sources: SourceSet):
    with pytest.raises(RecipeError, match="tensor `model"):
        engine.load(everywhere(sources, "task_arithmetic", full=1e300))


@pytest.mark.parametrize("prompt_tokens", [1, 24, 4096])
def test_batched_answers_equal_one_by_one_argmax_decoding(
    engine: TransformersEngine, sources: SourceSet, monkeypatch: pytest.MonkeyPatch, prompt_tokens: int
):
    """Left padding, reading prompts in parts, batching and dropping ended rows change nothing, in float32."""
    monkeypatch.setattr(engine, "_prompt_tokens", prompt_tokens)
    engine.load(everywhere(sources, "task_arithmetic", full=1.0, adapter=0.5))
    requests = [GenerateRequest(prompt, 3 + i) for i, prompt in enumerate(PROMPTS)]
    for request, answer in zip(requests, engine.generate(requests), strict=True):
        ids = list(engine.prompts.encode(request))
        written: list[int] = []
        while len(written) < request.max_tokens:
            with torch.inference_mode():
                logits = engine.model(input_ids=torch.tensor([ids + written])).logits[0, -1]
            written.append(int(logits.argmax()))
            if written[-1] in engine.prompts.eos_ids:
                break
        expected = engine.prompts.finish(written, request)
        assert answer == expected


def test_small_batches_give_the_answers_of_large_ones(sources: SourceSet):
    answers = []
    for batch_tokens in (64, 4096):
        engine = transformers_engine(sources, sources.layout(), device="cpu", batch_tokens=batch_tokens)
        engine.load(everywhere(sources, "task_arithmetic", full=1.0))
        answers.append(engine.generate([GenerateRequest(prompt, 6) for prompt in PROMPTS * 8]))
    assert answers[0] == answers[1]


def test_a_stop_text_ends_the_completion_and_is_cut_off(engine: TransformersEngine, sources: SourceSet):
    engine.load(everywhere(sources, "task_arithmetic", full=1.0))
    (whole,) = engine.generate([GenerateRequest("a b c", 8)])
    stop = next(letter for letter in whole.text if letter != whole.text[0])
    (cut,) = engine.generate([GenerateRequest("a b c", 8, stop=(stop,))])
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)] != ""


def test_log_likelihoods_equal_those_of_a_plain_forward_pass(engine: TransformersEngine, sources: SourceSet):
    engine.load(everywhere(sources, "task_arithmetic", full=1.0))
    requests = [LikelihoodRequest(prompt, " d e") for prompt in PROMPTS]
    for request, got in zip(requests, engine.loglikelihood(requests), strict=True):
        prompt, answer = engine.prompts.encode_pair(request)
        logp = model_logits(engine, request.prompt + request.continuation).log_softmax(-1)
        expected = sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert got.tokens == len(answer)
        assert math.isclose(got.total, expected, abs_tol=1e-4)


def test_chat_prompts_go_through_the_template(engine: TransformersEngine):
    plain = engine.prompts.encode(GenerateRequest("a b", 1))
    chat = engine.prompts.encode(GenerateRequest("a b", 1, chat=True))
    assert len(chat) > len(plain)


def test_a_device_that_is_not_there_is_refused(sources: SourceSet):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(EngineError, match=r"`engine.device` is 'cuda', but this machine has: cpu"):
        transformers_engine(sources, sources.layout(), device="cuda")


def test_running_out_of_memory_is_the_machines_fault(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
):
    def too_much(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.model, "forward", too_much)
    with pytest.raises(EngineError, match="out of accelerator memory while generating"):
        engine.generate([GenerateRequest("a b", 1)])


def test_drawn_tokens_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0])
    draws = Draws(GenerateRequest("a", 1, temperature=0.7, seed=3))
    found = torch.bincount(torch.tensor([draws.token(logits) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(found, (logits / 0.7).softmax(-1), rtol=0, atol=0.03)


def test_tokens_outside_top_p_are_never_drawn():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    draws = Draws(GenerateRequest("a", 1, temperature=1.0, top_p=0.7, seed=0))
    assert {draws.token(logits) for _ in range(300)} == {0, 1}


def test_an_answer_is_drawn_again_alike_whatever_is_asked_beside_it(
    engine: TransformersEngine, sources: SourceSet
):
    engine.load(Recipe("base", sources.models, {}))
    drawn = GenerateRequest("a b c", 12, temperature=2.0, seed=5)
    (alone,) = engine.generate([drawn])
    beside = [GenerateRequest(prompt, 12, temperature=2.0, seed=1) for prompt in PROMPTS]
    assert engine.generate([*beside, drawn])[-1] == alone
    assert engine.generate([GenerateRequest("a b c", 12, temperature=2.0, seed=6)]) != [alone]
