"""Gram matrices X^T X / rows of the inputs X of linear layers.

Layers that are given one and the same tensor (q, k and v; gate and up) share a matrix: a first pass over two
tokens finds out which do, and only one layer of each such set is listened to.

Imports: torch, `evomerge.statistics.texts`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from evomerge.statistics.texts import Tokens

Hook = Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]


def shared_inputs(model: Any, names: Collection[str], texts: Sequence[Tokens]) -> dict[str, str]:
    """Name of the weight of every linear layer -> that of the first with the same input, itself perhaps.

    Args:
        model: a causal language model of transformers.
        names: of weights; others are left out.
        texts: of which the first begins a pass.
    """
    layers = _layers(model, names)
    owners: dict[str, str] = {}
    # inputs are kept until the pass is over: an id may be used again once its tensor is gone
    seen: dict[int, tuple[torch.Tensor, str]] = {}

    def listener(name: str) -> Hook:
        def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            owners.setdefault(name, seen.setdefault(id(inputs[0]), (inputs[0], name))[1])

        return hook

    with _listening(layers, listener), torch.no_grad():
        model(input_ids=torch.tensor([texts[0].ids[:2]], device=model.device), use_cache=False)
    return {name: owners.get(name, name) for name in layers}


def gram_bytes(model: Any, owners: Mapping[str, str]) -> dict[str, int]:
    """Memory of every matrix by the name of its first layer, largest first."""
    layers = _layers(model, set(owners.values()))
    sizes = {name: 4 * layer.in_features**2 for name, layer in layers.items()}
    return dict(sorted(sizes.items(), key=lambda row: -row[1]))


def input_grams(
    model: Any,
    names: Collection[str],
    texts: Sequence[Tokens],
    *,
    batch: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, torch.Tensor]:
    """X^T X / rows for the linear layers with the weights `names`; rows are the tokens of all texts.

    Products are in float32, or float64 for a model in float64. Padding is on the right, where a causal model
    does not see it, and left out of X.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        names: of weights of linear layers, as the owners in `shared_inputs`.
        texts: one or more.
        batch: texts in one forward pass.
        progress: told of the tokens of every batch that is done.

    Returns:
        Name -> `(k, k)`; a layer whose inputs are not one per token (some experts) is left out.
    """
    layers = _layers(model, names)
    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = dict.fromkeys(layers, 0)
    odd: set[str] = set()
    mask = torch.empty(0, dtype=torch.bool)

    def listener(name: str) -> Hook:
        def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            if len(x) != mask.numel():
                odd.add(name)
                return
            x = x[mask.reshape(-1)].to(torch.promote_types(x.dtype, torch.float32))
            if name not in sums:
                sums[name] = x.new_zeros((x.shape[1], x.shape[1]))
            sums[name].addmm_(x.mT, x)
            rows[name] += len(x)

        return hook

    # the output head of an untied model has every token for input; where it is not asked, one will do
    kept = 0 if model.get_output_embeddings() in layers.values() else 1
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))  # of like length: little padding
    with _listening(layers, listener), torch.no_grad():
        for low in range(0, len(order), batch):
            chosen = [texts[i].ids for i in order[low : low + batch]]
            longest = len(chosen[-1])
            padded = [[*ids, *[0] * (longest - len(ids))] for ids in chosen]
            lengths = torch.tensor([[len(ids)] for ids in chosen], device=model.device)
            mask = torch.arange(longest, device=model.device) < lengths
            tokens = torch.tensor(padded, device=model.device)
            model(input_ids=tokens, attention_mask=mask.long(), use_cache=False, logits_to_keep=kept)
            progress(sum(map(len, chosen)))
    return {name: total.div_(rows[name]) for name, total in sums.items() if name not in odd}


def _layers(model: Any, names: Collection[str]) -> dict[str, Any]:
    """Linear layers by the name of their weight."""
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    return {
        name: module
        for name, module in modules.items()
        if name in names and isinstance(module, torch.nn.Linear)
    }


@contextmanager
def _listening(layers: Mapping[str, Any], listener: Callable[[str], Hook]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(listener(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
