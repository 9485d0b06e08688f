"""SCE with mergekit's own choice among equal variances, in float64.

The choice decides which entries are selected, and through the models' weights, which are mean squares of what
is selected, moves all others a little. So where variances at the cut are equal, mergekit's tensor is held
against the formula with the selection that it shows.

Source: Wan 2024, arXiv:2408.07990; as mergekit 0.1.5.
"""

from __future__ import annotations

import torch

from evomerge.recipe import Setting
from evomerge.sources.source_set import SourceSet
from tests.parity.compare import difference


def with_their_choice(
    sources: SourceSet, tensor: str, setting: Setting, theirs: torch.Tensor
) -> tuple[torch.Tensor, int] | None:
    """The merged tensor, and how many entries there are to choose from; None: there is no choice."""
    base = sources.base_tensor(tensor).double()
    deltas = torch.stack([difference(sources, model, tensor).double() for model in setting.models])
    variance = deltas.var(0, unbiased=False)
    count = int(setting.parameters["select_topk"] * int((variance != 0).sum()))
    if setting.parameters["select_topk"] >= 1.0 or not 0 < count < variance.numel():
        return None
    cut = variance.flatten().sort(descending=True).values[count - 1]
    near = (variance - cut).abs() <= 1e-6 * cut  # mergekit computes variances in float32
    above = (variance > cut) & ~near
    if int(above.sum() + near.sum()) == count:
        return None
    selected = above | (near & (theirs.double() != base.to(theirs.dtype).double()))
    kept = deltas * selected
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    squares = kept.square().flatten(1).mean(1)
    if squares.sum() < 1e-6:
        squares = torch.ones_like(squares)
    weights = (squares / squares.sum()).view(-1, *[1] * base.dim()) * (kept.sign() == sign)
    merged = base + (weights * kept).sum(0) / weights.sum(0).clamp(min=1e-6)
    return merged.to(theirs.dtype), int(near.sum())
