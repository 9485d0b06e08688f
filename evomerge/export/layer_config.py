"""config.json of a model whose layers were taken from other places: its depth, and what it says by layer.

Imports: `evomerge.errors`, `sources`; never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.errors import RecipeError
from evomerge.sources.source_set import SourceSet

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Lists that have as many entries as there are layers only by chance.
NOT_BY_LAYER = ("architectures", "_id", "_ids")


def _every(value: Any, layer: int) -> object:
    return layer % value


# Settings that give a layer its kind by its number: (value, layer) -> the kind.
BY_NUMBER: dict[str, Callable[[Any, int], object]] = {
    "first_k_dense_replace": lambda value, layer: layer < value,
    "mlp_only_layers": lambda value, layer: layer in value,
    "decoder_sparse_step": _every,
    "interleave_moe_layer_step": _every,
    "attn_layer_period": _every,
    "expert_layer_period": _every,
    "hybrid_override_pattern": lambda value, layer: value[layer : layer + 1],
}
# Of no effect where `layer_types` lists the kinds.
UNLISTED: dict[str, Callable[[Any, int], object]] = {
    "sliding_window_pattern": lambda value, layer: (
        value[layer % len(value)] if isinstance(value, str) else layer % value
    ),
    "full_attention_interval": _every,
}


def layered_config(sources: SourceSet, layers: Sequence[tuple[str, int]], where: str) -> dict[str, Any]:
    """The base's config.json for a model with other layers.

    Args:
        sources: the models.
        layers: model and number there, for every layer.
        where: begins the message of an error.

    Raises:
        RecipeError: the config does not say its number of layers, or has a rule by which a layer would be of
            another kind at its new place.
    """
    config = dict(sources.base.config)
    part, depth = _section(config)
    if depth is None:
        raise RecipeError(f"{where}: config.json of the base has none of {', '.join(DEPTHS)}; add it")
    _check_rules(part, layers, where)
    changed: dict[str, Any] = {
        key: _by_layer(sources, key, layers, where) for key in _lists(part, int(part[depth]))
    }
    changed[depth] = len(layers)
    if part is config:
        return {**config, **changed}
    return {**config, "text_config": {**part, **changed}}


def _section(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The part of a config that says how many layers there are, and under which key."""
    for part in (config, config.get("text_config") or {}):
        for key in DEPTHS:
            if isinstance(part.get(key), int):
                return part, key
    return config, None


def _lists(part: Mapping[str, Any], depth: int) -> list[str]:
    return [
        key
        for key, value in part.items()
        if isinstance(value, list) and len(value) == depth and not key.endswith(NOT_BY_LAYER)
    ]


def _by_layer(sources: SourceSet, key: str, layers: Sequence[tuple[str, int]], where: str) -> list[Any]:
    result = []
    for model, layer in layers:
        values = _section(sources.checkpoint(model).config)[0].get(key)
        if not isinstance(values, list) or layer >= len(values):
            raise RecipeError(
                f"{where}: config.json of the base has `{key}` with an entry per layer, and that of model "
                f"`{model}` has not; add it there"
            )
        result.append(values[layer])
    return result


def _check_rules(part: Mapping[str, Any], layers: Sequence[tuple[str, int]], where: str) -> None:
    rules = BY_NUMBER if part.get("layer_types") else {**BY_NUMBER, **UNLISTED}
    for key, kind in rules.items():
        value = part.get(key)
        if not value:
            continue
        for place, (model, layer) in enumerate(layers):
            if kind(value, place) != kind(value, layer):
                raise RecipeError(
                    f"{where}: config.json has `{key}: {value}`, by which layer {layer} of `{model}` is "
                    f"of another kind as layer {place}; move it to a place of its own kind"
                )
