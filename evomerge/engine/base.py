"""What an engine is: it holds one candidate's weights and answers requests with them.

Only a recipe goes in; completions, log-likelihoods and a load report come out, all plain data, so an
engine may live in another process. The engine owns the merger: candidate weights never leave it.

Imports: `evomerge.recipe` and `evomerge.errors`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from evomerge.recipe import Recipe


@dataclass(frozen=True)
class GenerateRequest:
    """One greedy completion.

    Attributes:
        prompt: the text, or the user's message when `chat` is true.
        max_tokens: most new tokens, at least 1.
        chat: wrap the prompt in the model's chat template.
        system: system message for the chat template; None leaves the template's own default.
        stop: texts at which the completion ends (they are cut off).
    """

    prompt: str
    max_tokens: int
    chat: bool = False
    system: str | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """Answer to a `GenerateRequest`; `tokens` counts new tokens, end of turn included."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class LikelihoodRequest:
    """The log-likelihood of `continuation` after `prompt`."""

    prompt: str
    continuation: str
    chat: bool = False
    system: str | None = None


@dataclass(frozen=True)
class Likelihood:
    """Sum of the continuation's token log-probabilities in nats, and how many tokens that were."""

    total: float
    tokens: int


@dataclass(frozen=True)
class Loaded:
    """What `load` did: seconds, tensors written, and the fingerprint of the merged tensors.

    `parts` are seconds of steps of it, where an engine tells them: `merge`, `swap` and `check`.
    """

    seconds: float
    tensors: int
    fingerprint: str
    parts: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Holds one candidate at a time."""

    @property
    def info(self) -> Mapping[str, Any]:
        """Name, versions, device and dtype: recorded with the run."""
        ...

    def load(self, recipe: Recipe) -> Loaded:
        """Merge `recipe` into the engine's weights and check that they arrived.

        Raises:
            RecipeError: the recipe is wrong, or its weights are not finite.
            EngineError: the machine failed, or the fingerprints differ.
        """
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Greedy completions, in the order of the requests."""
        ...

    def loglikelihood(self, requests: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """Log-likelihoods, in the order of the requests."""
        ...

    def close(self) -> None:
        """Give back memory and processes; safe to call twice."""
        ...
