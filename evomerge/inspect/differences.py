"""What a model's folder says other than the base's: configuration keys, and tokens of the tokenizer.

Imports: `evomerge.sources`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.sources.checkpoint import read_json
from evomerge.sources.tokenizer import FAST, SENTENCEPIECE, sentencepiece_differs, vocabulary

# Files compared key by key. `added_tokens_decoder` says again what the vocabulary says.
FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
LEFT_OUT = ("added_tokens_decoder",)
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Differences:
    """What differs from the base; a file that only one of the two folders has is not compared.

    Attributes:
        files: names of the files that were compared.
        keys: rows with `file`, `key` (nested keys joined by dots), and `base` and `model`: its values; a side
            that lacks the key has no value.
        added: token -> id of tokens that the base lacks; None: no vocabularies to compare.
        removed: token -> id of the base's tokens that the model lacks; None likewise.
        moved: token -> (id in the base, id in the model) where both have it; None likewise.
        sentencepiece: whether the two `tokenizer.model` differ, where that is all there is.
    """

    files: tuple[str, ...] = ()
    keys: list[dict[str, Any]] = field(default_factory=list)
    added: Mapping[str, int] | None = None
    removed: Mapping[str, int] | None = None
    moved: Mapping[str, tuple[int, int]] | None = None
    sentencepiece: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain data: `config` and `tokenizer`."""
        tokenizer = {
            "added": dict(self.added or {}),
            "removed": dict(self.removed or {}),
            "moved": {token: list(ids) for token, ids in (self.moved or {}).items()},
            "other_sentencepiece_model": self.sentencepiece,
        }
        return {"compared_files": list(self.files), "config": self.keys, "tokenizer": tokenizer}


def differences(model: Path, base: Path) -> Differences:
    """Compare two folders.

    Raises:
        SourceError: a file is not JSON.
    """
    known = (*FILES, TEMPLATE, FAST, SENTENCEPIECE)
    files = tuple(file for file in known if (model / file).is_file() and (base / file).is_file())
    keys = [row for file in FILES if file in files for row in _keys(file, model / file, base / file)]
    if TEMPLATE in files and (model / TEMPLATE).read_bytes() != (base / TEMPLATE).read_bytes():
        keys.append({"file": TEMPLATE, "key": "", "base": "one text", "model": "another"})
    tokens, its = vocabulary(model), vocabulary(base)
    if tokens is None or its is None:
        return Differences(files, keys, sentencepiece=sentencepiece_differs(model, base))
    both = sorted((number, token) for token, number in its.items() if token in tokens)
    return Differences(
        files,
        keys,
        added=_by_id({token: number for token, number in tokens.items() if token not in its}),
        removed=_by_id({token: number for token, number in its.items() if token not in tokens}),
        moved={token: (number, tokens[token]) for number, token in both if tokens[token] != number},
    )


def _keys(file: str, model: Path, base: Path) -> list[dict[str, Any]]:
    mine, its = _flat(read_json(model)), _flat(read_json(base))
    rows = []
    for key in sorted({*mine, *its}):
        if mine.get(key) == its.get(key) and (key in mine) == (key in its):
            continue
        sides = {side: values[key] for side, values in (("base", its), ("model", mine)) if key in values}
        rows.append({"file": file, "key": key, **sides})
    return rows


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if key in LEFT_OUT:
            continue
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _by_id(tokens: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(tokens.items(), key=lambda item: item[1]))
