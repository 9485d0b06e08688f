"""Tied embeddings: models whose output head is the embedding matrix, stored once or twice.

A base that ties its embeddings has one matrix to merge, named after the embedding. Its copies follow these
rules: a stored head that equals the embedding is left out, one that differs is refused.

Imports: `evomerge.sources.checkpoint`, `.adapter`; torch only when two stored matrices are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint, TensorFiles

HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings)\.weight$")


def head_of(names: Iterable[str]) -> str | None:
    """Name of the output head among tensor names."""
    return next((name for name in names if HEAD.search(name)), None)


def embedding_of(names: Iterable[str]) -> str | None:
    """Name of the token embedding among tensor names."""
    return next((name for name in names if EMBEDDING.search(name)), None)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether head and embedding are one matrix: the head is not stored, or config.json says so."""
    return head_of(checkpoint.tensors) is None or bool(setting(checkpoint, "tie_word_embeddings"))


def setting(checkpoint: Checkpoint, key: str) -> object:
    """`key` of config.json, or of its `text_config` for a model with several towers; None when absent."""
    value = checkpoint.config.get(key)
    return value if value is not None else (checkpoint.config.get("text_config") or {}).get(key)


def mergeable(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Tensor names of a base in its order, without the second copy of a tied embedding."""
    head = head_of(checkpoint.tensors) if is_tied(checkpoint) else None
    return tuple(name for name in checkpoint.tensors if name != head)


def copy_problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the stored head of a checkpoint that must tie its embeddings; None: nothing."""
    head, embedding = head_of(checkpoint.tensors), embedding_of(checkpoint.tensors)
    if head is None or embedding is None or _equal(checkpoint, head, embedding):
        return None
    return f"`{head}` differs from `{embedding}`, but config.json says that they are one matrix"


def full_problem(model: Checkpoint, base: Checkpoint) -> str | None:
    """Why a full checkpoint's head does not fit the base's; None: it does."""
    head = head_of(model.tensors)
    if not is_tied(base):
        if head is not None and not is_tied(model):
            return None
        return (
            f"it ties its embeddings, but the base stores `{head_of(base.tensors)}` of its own; "
            "save the model untied or take it out"
        )
    problem = copy_problem(model)
    if problem is None:
        return None
    return (
        f"`{head}` differs from `{embedding_of(model.tensors)}`, but the base ties the two; "
        "take the model out or use an untied base"
    )


def adapter_problem(adapter: Adapter, base: Checkpoint) -> str | None:
    """Why an adapter cannot be merged into a base with tied embeddings; None: it can.

    A change of the embedding alone would change the head as well, which the adapter was not trained for,
    unless peft's `ensure_weight_tying` trained both as one.
    """
    embedding = embedding_of(base.tensors)
    if not is_tied(base) or embedding is None:
        return None
    head = head_of((*adapter.full, *adapter.pairs))
    touched = embedding in adapter.full or embedding in adapter.pairs
    both = head in adapter.full and embedding in adapter.full
    if adapter.config.get("ensure_weight_tying") and (touched or head is None):
        return None
    if both and _equal(adapter, adapter.full[str(head)], adapter.full[embedding]):
        return None
    if head is None and embedding not in adapter.pairs and not _replaces(adapter, base, embedding):
        return None
    which = (
        f"`{head}` and `{embedding}` each for itself" if touched and head else f"`{head or embedding}` alone"
    )
    return (
        f"the adapter changes {which}, but the base ties embedding and head; train it with "
        "`ensure_weight_tying` or leave both out of `target_modules` and `modules_to_save`"
    )


def _equal(files: TensorFiles, first: str, second: str) -> bool:
    import torch

    return torch.equal(files.read(first), files.read(second))


def _replaces(adapter: Adapter, base: Checkpoint, name: str) -> bool:
    import torch

    tensor = adapter.replacement(name)
    return tensor is not None and not torch.equal(tensor.float(), base.read(name).float())
