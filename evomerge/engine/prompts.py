"""Text to tokens and back, shared by engines: chat template, encoding, stop rules.

Every prompt of a run is encoded once: candidates differ in weights, never in their questions.

Imports: `engine.base`; the tokenizer is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.engine.base import Completion, GenerateRequest, LikelihoodRequest
from evomerge.errors import EngineError


class PromptEncoder:
    """Encodes requests with a tokenizer and decides when a completion has ended.

    Args:
        tokenizer: a transformers tokenizer.
        eos: end-of-turn token ids of the generation configuration (an id, a list, or None).
    """

    def __init__(self, tokenizer: Any, eos: int | Sequence[int] | None) -> None:
        self._tokenizer = tokenizer
        ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        self.eos_ids = frozenset(ids)
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else next(iter(sorted(self.eos_ids)), 0)
        self._cache: dict[tuple[str, bool, str | None], tuple[int, ...]] = {}

    def encode(self, request: GenerateRequest | LikelihoodRequest) -> tuple[int, ...]:
        """Token ids of a request's prompt.

        Raises:
            EngineError: a chat prompt, and the tokenizer has no chat template; or an empty prompt.
        """
        key = (request.prompt, request.chat, request.system)
        if key not in self._cache:
            ids = tuple(self._tokenizer(self._text(*key), add_special_tokens=not request.chat)["input_ids"])
            if not ids:
                raise EngineError("a prompt has no tokens; give it some text in the task's `prompt`")
            self._cache[key] = ids
        return self._cache[key]

    def encode_pair(self, request: LikelihoodRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of prompt and continuation, split where the prompt alone ends when both are encoded."""
        prompt = self.encode(request)
        text = self._text(request.prompt, request.chat, request.system) + request.continuation
        both = tuple(self._tokenizer(text, add_special_tokens=not request.chat)["input_ids"])
        # A token may span the border; then the continuation owns it, so that no probability is lost.
        common = 0
        while common < min(len(prompt), len(both) - 1) and prompt[common] == both[common]:
            common += 1
        if common == 0:
            raise EngineError("a continuation shares no token with its prompt; begin the prompt with text")
        return both[:common], both[common:]

    def _text(self, prompt: str, chat: bool, system: str | None) -> str:
        if not chat:
            return prompt
        if not self._tokenizer.chat_template:
            raise EngineError(
                "a task has `chat: true`, but the base model's tokenizer has no chat template; "
                "set `chat: false` and write the prompt out"
            )
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def finish(self, tokens: Sequence[int], request: GenerateRequest) -> Completion | None:
        """The completion if `tokens` end it (end of turn, stop text, length), else None."""
        count = len(tokens)
        if tokens[-1] in self.eos_ids:
            return Completion(self._decode(tokens[:-1]), count, "stop")
        if request.stop:
            text = self._decode(tokens)
            cut = min((at for stop in request.stop if (at := text.find(stop)) >= 0), default=-1)
            if cut >= 0:
                return Completion(text[:cut], count, "stop")
        if count >= request.max_tokens:
            return Completion(self._decode(tokens), count, "length")
        return None

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text
