"""Do all sources fit the base? Checked before anything runs, from headers and JSON files.

Imports: `evomerge.errors` and the other modules of `evomerge.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import CompatibilityError
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import FLOATING, Checkpoint
from evomerge.sources.tokenizer import difference, sentencepiece_differs, vocabulary
from evomerge.sources.tying import (
    adapter_problem,
    copy_problem,
    embedding_of,
    full_problem,
    head_of,
    is_tied,
    mergeable,
    setting,
)

if TYPE_CHECKING:
    from evomerge.sources.source_set import SourceSet

# Models with equal shapes compute different functions when one of these differs.
SAME_SETTINGS = ("num_attention_heads", "num_key_value_heads", "hidden_act")


def check(source_set: SourceSet, *, same_layers: bool = True) -> None:
    """Compare every source with the base; with `same_layers`, tensor by tensor.

    Raises:
        CompatibilityError: one line per source that does not fit, each with its first problem.
    """
    lines = [
        f"{'base' if name == source_set.base_name else 'model'} `{name}`: {problem}"
        for name, problem in problems(source_set, same_layers=same_layers).items()
    ]
    if lines:
        raise CompatibilityError("\n".join(lines))


def problems(source_set: SourceSet, *, same_layers: bool = True) -> dict[str, str]:
    """The first problem of every source that cannot be merged, by name, base first.

    A full checkpoint needs the base's architecture, vocabulary, tensor names, shapes and tokenizer; chat
    templates may differ. An adapter needs targets that the base has, in the base's shapes, and no token
    whose id differs from the base's. Without `same_layers`, names and shapes of full checkpoints' tensors
    are not looked at.
    """
    base = source_set.base
    tokens = vocabulary(base.folder)
    found: dict[str, str | None] = {}
    if is_tied(base):
        found[source_set.base_name] = copy_problem(base)
    for name, source in source_set.sources.items():
        if isinstance(source, Adapter):
            found[name] = _adapter(source, source_set, tokens)
        else:
            found[name] = _full(source, source_set, tokens, same_layers)
    return {name: problem for name, problem in found.items() if problem}


def _full(
    model: Checkpoint, source_set: SourceSet, tokens: Mapping[str, int] | None, same_layers: bool
) -> str | None:
    base = source_set.base
    return (
        _architecture(model, base)
        or _vocabulary_size(model, base)
        or full_problem(model, base)
        or (_tensors(model, source_set) if same_layers else None)
        or _dtypes(model, base)
        or _tokenizer(model.folder, base.folder, tokens, allow_added=False)
    )


def _adapter(adapter: Adapter, source_set: SourceSet, tokens: Mapping[str, int] | None) -> str | None:
    base = source_set.base
    shapes = adapter.shapes()
    if is_tied(base):
        shapes.pop(str(head_of(shapes)), None)
    for name in shapes:
        if name not in base.tensors:
            return (
                f"the adapter changes `{name}` of shape {shapes[name]}, which is no tensor of the "
                f"base (such as `{source_set.tensor_names[0]}`); the adapter is for another base"
            )
    return (
        _shapes(shapes, base, "; the adapter is for another base")
        or adapter_problem(adapter, base)
        or _tokenizer(adapter.folder, base.folder, tokens, allow_added=True)
    )


def _architecture(model: Checkpoint, base: Checkpoint) -> str | None:
    for key in ("model_type", "architectures"):
        mine, its = model.config.get(key), base.config.get(key)
        if mine and its and mine != its:
            return f"`{key}` is {_plain(mine)}, the base's is {_plain(its)}; use models of one architecture"
    for key in SAME_SETTINGS:
        mine, its = setting(model, key), setting(base, key)
        if mine is not None and its is not None and mine != its:
            return f"`{key}` is {mine}, the base's is {its}; use models of one architecture"
    return None


def _vocabulary_size(model: Checkpoint, base: Checkpoint) -> str | None:
    mine, its = setting(model, "vocab_size"), setting(base, "vocab_size")
    if mine is None or its is None or mine == its:
        return None
    name = embedding_of(base.tensors)
    tensor = ""
    if name is not None and name in model.tensors:
        tensor = f" (`{name}` has shape {model.tensors[name].shape}, base has {base.tensors[name].shape})"
    return (
        f"its vocabulary has {mine} entries, the base's has {its}{tensor}; "
        "resize the model's embedding to the base's or take it out"
    )


def _tensors(model: Checkpoint, source_set: SourceSet) -> str | None:
    return _names(model, source_set) or _shapes(
        {name: model.tensors[name].shape for name in source_set.tensor_names}, source_set.base
    )


def _names(model: Checkpoint, source_set: SourceSet) -> str | None:
    wanted, stored = set(source_set.tensor_names), set(mergeable(model))
    if is_tied(source_set.base):
        stored.discard(str(head_of(stored)))
    missing, extra = sorted(wanted - stored), sorted(stored - wanted)
    if not missing and not extra:
        return None
    parts = [
        f"{word} {len(names)} tensor{'s' * (len(names) > 1)} (`{names[0]}`{', ...' if names[1:] else ''})"
        for word, names in (("lacks", missing), ("has, and the base lacks,", extra))
        if names
    ]
    return f"it {' and '.join(parts)}; all models of a recipe need the base's tensors"


def _shapes(
    shapes: Mapping[str, tuple[int, ...]],
    base: Checkpoint,
    remedy: str = "; all models of a recipe need one layout",
) -> str | None:
    for name, shape in shapes.items():
        if shape != base.tensors[name].shape:
            return f"tensor `{name}` has shape {shape}, base has {base.tensors[name].shape}{remedy}"
    return None


def _dtypes(model: Checkpoint, base: Checkpoint) -> str | None:
    for name, info in base.tensors.items():
        if info.floating and name in model.tensors and not model.tensors[name].floating:
            return (
                f"tensor `{name}` is stored as {model.tensors[name].dtype}, but only "
                f"{', '.join(FLOATING)} can be merged; use the unquantized model"
            )
    return None


def _tokenizer(
    folder: Path, base: Path, tokens: Mapping[str, int] | None, *, allow_added: bool
) -> str | None:
    text = difference(vocabulary(folder), tokens, allow_added=allow_added)
    if text is None and sentencepiece_differs(folder, base):
        text = "`tokenizer.model` is another file than the base's"
    if text is None:
        return None
    return f"its tokenizer is not the base's: {text}; merging mixes embedding rows of different tokens"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"
