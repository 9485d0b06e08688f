"""Do two folders tokenize alike? Compares what decides which row of the embedding a text reads.

Imports: `evomerge.sources.checkpoint`; no tokenizer library and never torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evomerge.sources.checkpoint import hash_files, read_json

FAST = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"


def vocabulary(folder: Path) -> Mapping[str, int] | None:
    """Token -> id from `tokenizer.json`, added tokens included; None where the folder has no such file.

    Raises:
        SourceError: the file is not JSON.
    """
    if not (folder / FAST).is_file():
        return None
    data = read_json(folder / FAST)
    vocab = (data.get("model") or {}).get("vocab") or {}
    # Unigram models store a list of [token, score] in the order of the ids.
    tokens = dict(vocab) if isinstance(vocab, dict) else {row[0]: i for i, row in enumerate(vocab)}
    tokens.update({token["content"]: token["id"] for token in data.get("added_tokens") or []})
    return tokens


def difference(
    tokens: Mapping[str, int] | None, base: Mapping[str, int] | None, *, allow_added: bool
) -> str | None:
    """The first token that two vocabularies disagree on, in words; None when they agree.

    A folder without a `tokenizer.json` (None) agrees with every other.

    Args:
        tokens: the model's token -> id.
        base: the base's.
        allow_added: tokens that only one of the two has are no difference.
    """
    if tokens is None or base is None or tokens == base:
        return None
    for token, number in sorted(tokens.items(), key=lambda item: item[1]):
        if token not in base and not allow_added:
            return f"token `{token}` (id {number}) is not in the base's"
        if base.get(token, number) != number:
            return f"token `{token}` has id {number}, the base's has id {base[token]}"
    missing = [token for token in base if token not in tokens]
    if missing and not allow_added:
        return f"token `{missing[0]}` (id {base[missing[0]]}) of the base is missing"
    return None


def sentencepiece_differs(folder: Path, base: Path) -> bool:
    """Whether two folders that both lack `tokenizer.json` hold different SentencePiece models."""
    files = folder / SENTENCEPIECE, base / SENTENCEPIECE
    if (folder / FAST).is_file() or (base / FAST).is_file() or not all(file.is_file() for file in files):
        return False
    return hash_files(files[:1]) != hash_files(files[1:])
