"""Texts of a file, and the same as tokens of which some are scored.

A `.jsonl` file has `text`, or `prompt` and `completion`, in every line; any other file is a text per line.
Of a completion all tokens are scored, of a text all but the first, which nothing comes before.

Imports: `evomerge.errors`; the tokenizer is handed in.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evomerge.errors import ConfigError


class Text(NamedTuple):
    """A text in two parts; the model is asked how likely the second is after the first."""

    prompt: str
    completion: str


class Tokens(NamedTuple):
    """Token ids of a text; those from `first` (at least 1) on are scored."""

    ids: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        """Number of tokens that are scored."""
        return len(self.ids) - self.first


def read_texts(path: Path) -> list[Text]:
    """Texts of a file, in its order; blank lines are left out.

    Raises:
        ConfigError: no such file, not UTF-8, a line that is not as it should be, or no text at all.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path of the texts") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}); check the file") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        texts = [_row(line, f"{path}:{number}") for number, line in rows]
    else:
        texts = [Text("", line) for _, line in rows]
    if not texts:
        raise ConfigError(f"{path}: there is no text in it; give at least one line")
    return texts


def _row(line: str, where: str) -> Text:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}); write one object per line") from error
    form = "`text`, or `prompt` and `completion`, as text"
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: {line[:40]!r} is no JSON object; it must have {form}")
    parts = ("", data.get("text")) if "text" in data else (data.get("prompt"), data.get("completion"))
    prompt, completion = parts
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ConfigError(f"{where}: the keys are {', '.join(data) or 'none'}; there must be {form}")
    return Text(prompt, completion)


def choose(
    texts: Sequence[Text], tokenizer: Any, *, max_length: int, max_tokens: int, seed: int
) -> list[Tokens]:
    """Texts in an order drawn from `seed`, as tokens, until `max_tokens` tokens are reached.

    Args:
        texts: one or more.
        tokenizer: of transformers.
        max_length: tokens of a text beyond these are cut off.
        max_tokens: the text with which this number is reached is the last; it is taken whole.
        seed: of the order.

    Raises:
        ConfigError: no text has a token to score.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    chosen, total = [], 0
    for tokens in _encoded(order, tokenizer, max_length):
        chosen.append(tokens)
        total += len(tokens.ids)
        if total >= max_tokens:
            break
    if not chosen:
        raise ConfigError(
            f"none of the {len(order)} texts has a token to score within {max_length} tokens; give longer "
            "texts or, where prompts are long, a larger --max-length"
        )
    return chosen


def _encoded(texts: Sequence[Text], tokenizer: Any, max_length: int) -> Iterator[Tokens]:
    for text in texts:
        ids = tuple(tokenizer(text.prompt + text.completion)["input_ids"])
        first = 1
        if text.prompt:
            # a token may span the border; then it counts to the completion
            for alone, both in zip(tokenizer(text.prompt)["input_ids"][1:], ids[1:], strict=False):
                if alone != both:
                    break
                first += 1
        tokens = Tokens(ids[:max_length], first)
        if tokens.scored > 0:
            yield tokens
