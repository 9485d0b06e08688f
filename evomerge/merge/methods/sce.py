"""SCE: select the positions where models differ most, calculate a weight per model, erase minority signs.

Per tensor, with all models at once: of the positions where the variance over models is not 0, the
`select_topk` largest stay; a model's weight is the mean square of what is left of its task vector; the sign
of a position is that of the sum, and models that disagree do not count.

As in mergekit all weights are equal when the mean squares sum to less than 1e-6, which is usual for
fine-tuned language models, and the selection holds for the merge as well as for the weights (in the authors'
code for the weights alone).

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.merge.methods._method import CHUNK, Kernel, Method, TensorInputs
from evomerge.recipe import BASE_COPY, MethodSpec, ParameterSpec, Setting

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

SMALLEST_SQUARE = 1e-6  # mean squares that sum to less than this give equal weights (mergekit)
SMALLEST_DIVISOR = 1e-6  # no sum of weights divides by less than this (mergekit)


def kernel(inputs: TensorInputs) -> Kernel:
    """base + sum_i c_i kept_i / max(sum_i c_i, 1e-6) over the models whose kept entry has the elected sign.

    Memory beside the task vectors: one byte per entry from here on, and while this selects, one value in
    the working dtype more; what is remembered is a few bytes per model.
    """
    import torch

    share = inputs.parameter("select_topk")
    keep = None if share >= 1.0 else selected(inputs, share)
    weights = model_weights(inputs, keep)
    terms = [(delta, c) for delta, c in zip(inputs.deltas, weights, strict=True) if delta is not None]
    scratch = inputs.scratch(4)
    one = torch.ones((), dtype=inputs.dtype, device=inputs.base.device)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        mix, divisor, sign, x = scratch[:, : high - low]
        sign.zero_()
        for delta, _ in terms:
            sign.add_(delta[low:high])
        torch.copysign(one, sign, out=sign)  # a sum of 0 elects +
        if keep is not None:
            sign.mul_(keep[low:high])
        mix.zero_()
        divisor.zero_()
        for delta, c in terms:
            torch.mul(delta[low:high], sign, out=x).clamp_(min=0.0)  # what disagrees is negative now
            mix.add_(x, alpha=c)
            divisor.add_(x.sign_(), alpha=c)
        out.add_(mix.mul_(sign).div_(divisor.clamp_(min=SMALLEST_DIVISOR)))

    return run


def selected(inputs: TensorInputs, share: float) -> torch.Tensor:
    """`(n,)` bool: the int(share * count) positions of largest variance, `count` having any.

    Of equal variances those that come first in flat order.
    """
    import torch

    from evomerge.merge.magnitude import MagnitudeIndex

    spread = variance(inputs.deltas, inputs.base, inputs.dtype)
    count = int(share * int(spread.count_nonzero()))
    if count == 0:
        return torch.zeros(spread.numel(), dtype=torch.bool, device=spread.device)
    ranks = inputs.once(("variance", *inputs.models), lambda: MagnitudeIndex(spread))
    cut = ranks.largest(spread, count)
    keep = spread > cut.threshold
    keep[: cut.last + 1] |= spread[: cut.last + 1] == cut.threshold
    return keep


def variance(deltas: Sequence[TaskVector | None], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(n,)` in `dtype`: the population variance over models of every position; None counts as zeros.

    Welford's recurrence in float64: it is exactly 0 where all models agree.
    """
    import torch

    result = torch.empty(like.numel(), dtype=dtype, device=like.device)
    mean, square, x, step = torch.empty(
        (4, min(CHUNK, like.numel())), dtype=torch.float64, device=like.device
    )
    for low in range(0, like.numel(), CHUNK):
        part = result[low : low + CHUNK]
        m, s, d, e = (buffer[: part.numel()] for buffer in (mean.zero_(), square.zero_(), x, step))
        for number, delta in enumerate(deltas, 1):
            if delta is None:
                d.zero_()
            else:
                d.copy_(delta[low : low + CHUNK])
            torch.sub(d, m, out=e)
            m.add_(e, alpha=1.0 / number)
            s.add_(e.mul_(d.sub_(m)))
        part.copy_(s.div_(len(deltas)))
    return result


def model_weights(inputs: TensorInputs, keep: torch.Tensor | None) -> list[float]:
    """The mean square of what is kept of each task vector, over their sum; equal weights for a tiny sum."""

    def square(model: str, delta: TaskVector | None) -> float:
        if delta is None:
            return 0.0
        if keep is not None:
            return mean_square(delta, keep)
        return inputs.once(("mean square", model), lambda: mean_square(delta, None))

    squares = list(map(square, inputs.models, inputs.deltas))
    total = math.fsum(squares)
    if total < SMALLEST_SQUARE:
        return [1.0 / len(squares)] * len(squares)
    return [square / total for square in squares]


def mean_square(delta: TaskVector, keep: torch.Tensor | None) -> float:
    """Squares where `keep` is true (None: everywhere), summed in float64, over the number of all entries."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=delta.device)
    for low in range(0, delta.numel(), CHUNK):
        part = delta[low : low + CHUNK].double()
        if keep is not None:
            part = part * keep[low : low + CHUNK]
        total += part.square().sum()
    return float(total) / delta.numel()


def canonical(setting: Setting) -> Setting:
    """Nothing selected is the base, and so is a selection of one model, which varies nowhere.

    One model without a selection is itself.
    """
    setting = SPEC.complete(setting, SPEC.name)
    share = setting.parameters["select_topk"]
    if share == 0.0 or (share < 1.0 and len(setting.models) == 1):
        return BASE_COPY
    if len(setting.models) == 1:
        alone = {name: {"weight": 1.0} for name in setting.models}
        return Setting("task_arithmetic", {"lambda": 1.0, "normalize": False}, alone)
    return setting


SPEC = MethodSpec(
    name="sce",
    shared={
        "select_topk": ParameterSpec(
            low=0.0, high=1.0, default=1.0, doc="the share kept of the positions where the models differ"
        )
    },
    per_model={},
    canonical=canonical,
    min_models=1,
    mergekit="sce",
    source="Wan 2024 (FuseChat), arXiv:2408.07990; selection and weights as mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, streams=True),)
