"""An engine without weights: completions are a function of recipe and request.

For tests of everything outside the engine, in milliseconds and without torch.

Imports: `evomerge.errors`, `evomerge.recipe`, `engine.base`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.engine.base import (
    Completion,
    GenerateRequest,
    Likelihood,
    LikelihoodRequest,
    Loaded,
)
from evomerge.errors import EngineError
from evomerge.recipe import Recipe


class FakeEngine:
    """An `Engine` whose answers are computed, with tokens taken to be words.

    Args:
        answer: completion of a request under a recipe, before it is cut at `stop` and `max_tokens`.
        likelihood: log-likelihood in nats; without it every continuation has minus its number of words.
        fail_at: exceptions by number of the load at which they are raised, from 1. A failed load leaves
            the engine without a recipe, as a dead process would.

    Attributes:
        recipe: the recipe it holds; None before the first load, after a failed one and when closed.
        loads: calls of `load`, failed ones included.
        generate_calls, likelihood_calls: calls with requests.
        requests: requests answered, of both kinds.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        answer: Callable[[Recipe, GenerateRequest], str],
        likelihood: Callable[[Recipe, LikelihoodRequest], float] | None = None,
        fail_at: Mapping[int, Exception] | None = None,
    ) -> None:
        self._answer = answer
        self._likelihood = likelihood or (lambda recipe, request: -float(len(_words(request.continuation))))
        self._fail_at = dict(fail_at or {})
        self.recipe: Recipe | None = None
        self.loads = 0
        self.generate_calls = 0
        self.likelihood_calls = 0
        self.requests = 0
        self.closed = False

    @property
    def info(self) -> Mapping[str, Any]:
        """What a real engine says of itself."""
        return {"name": "fake", "version": "1", "device": "none", "dtype": "none"}

    def load(self, recipe: Recipe) -> Loaded:
        """Hold `recipe`; its fingerprint is the head of its digest.

        Raises:
            Exception: the one that `fail_at` names for this load.
            EngineError: the engine is closed.
        """
        self.loads += 1
        self.recipe = None
        if self.closed:
            raise EngineError("the fake engine is closed; make a new one")
        if self.loads in self._fail_at:
            raise self._fail_at[self.loads]
        self.recipe = recipe
        return Loaded(seconds=0.0, tensors=0, fingerprint=recipe.digest[:16])

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion for each request, cut as a real engine cuts it."""
        recipe = self._held()
        self.generate_calls += 1
        self.requests += len(requests)
        return [_cut(self._answer(recipe, request), request) for request in requests]

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """One likelihood for each request."""
        recipe = self._held()
        self.likelihood_calls += 1
        self.requests += len(requests)
        return [
            Likelihood(self._likelihood(recipe, request), len(_words(request.continuation)))
            for request in requests
        ]

    def close(self) -> None:
        """Refuse further work."""
        self.closed = True
        self.recipe = None

    def _held(self) -> Recipe:
        if self.recipe is None:
            raise EngineError("the fake engine holds no recipe; call `load` first")
        return self.recipe


def _words(text: str) -> list[str]:
    """Words with the white space before them: joined, they are `text` but for white space at its end."""
    return re.findall(r"\s*\S+", text)


def _cut(text: str, request: GenerateRequest) -> Completion:
    for stop in request.stop:
        text = text.partition(stop)[0]
    words = _words(text)
    if len(words) > request.max_tokens:
        return Completion("".join(words[: request.max_tokens]), request.max_tokens, "length")
    return Completion(text, len(words), "stop")
