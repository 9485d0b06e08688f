"""OTA with FFG: task vectors averaged by the curvature that Adam saw, the least salient entries left out.

Imports: `evomerge.recipe`, `evomerge.sources.statistics`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import DENSITY
from evomerge.merge.methods._measured import average, measured
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting
from evomerge.sources.statistics import SECOND_MOMENT

if TYPE_CHECKING:
    import torch

POWER = ParameterSpec(
    low=0.0, high=1.0, default=0.5, doc="the exponent of the second moments (0: all entries count alike)"
)
EPS = ParameterSpec(low=0.0, default=1e-26, doc="added to the powers; must be far below them")
THRESHOLD = ParameterSpec(
    low=0.0, default=0.0, doc="the saliency v delta^2 below which an entry of a model is left out"
)
SLACK = 1.1  # sums of up to this many times N eps hold no entry that counts (the authors' code)


def kernel(inputs: TensorInputs) -> Kernel:
    """base + sum_i p_i delta_i / sum_i p_i with p_i = v_i^power + eps where the saliency is large, else 0.

    v_i is Adam's second moment of model i. The saliency v_i delta_i^2 must reach `threshold` and, of the n
    entries of this tensor, the max(1, int(density n))-th largest; entries equal to that one stay in. Where
    sum_i p_i <= 1.1 N eps, no model has a say and the base stays. Both apply with their defaults to all
    entries. Thresholds are about 1e-20, so they are fixed values (`constants`) rather than searched ones,
    and `density` is what one searches.

    A tensor without second moments is the plain average of the models.
    Memory while a tensor is merged: 2 N more times the tensor; the cut of each density is remembered.
    """
    count = len(inputs.deltas)
    rows = measured(inputs, SECOND_MOMENT, [1.0] * count)
    if rows is None:
        return average(inputs, [1.0 / count] * count)
    power, eps = inputs.parameter("power"), inputs.parameter("eps")
    moments = [row.statistics.reshape(-1) for row in rows]
    cuts = [cut(inputs, index, moment) for index, moment in enumerate(moments)]
    scratch = inputs.scratch(4)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        factor, total, mix, score = scratch[:, : high - low]
        total.zero_()
        mix.zero_()
        for moment, delta, least in zip(moments, inputs.deltas, cuts, strict=True):
            part = None if delta is None else delta[low:high]
            factor.copy_(moment[low:high]).pow_(power).add_(eps)
            if least > 0.0:
                factor.mul_(saliency(moment[low:high], part, score) >= least)
            total.add_(factor)
            if part is not None:
                mix.addcmul_(factor, part)
        silent = total <= SLACK * count * eps
        out.add_(mix.div_(total).masked_fill_(silent, 0.0))

    return run


def saliency(moment: torch.Tensor, delta: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """The saliency v delta^2, written to `out`."""
    import torch

    if delta is None:
        return out.zero_()
    return torch.mul(moment, delta, out=out).mul_(delta)


def cut(inputs: TensorInputs, index: int, moment: torch.Tensor) -> float:
    """Saliency that an entry of model `index` must reach."""
    import torch

    model, delta = inputs.models[index], inputs.deltas[index]
    density, n = inputs.values("density")[index], moment.numel()
    threshold = inputs.values("threshold")[index]
    if density == 1.0 or delta is None:
        return threshold
    kept = max(1, int(density * n))

    def find() -> float:
        score = saliency(moment, delta[:], torch.empty_like(moment))
        return float(score.kthvalue(n - kept + 1).values)

    return max(threshold, inputs.once(("ota", model, kept), find))


def canonical(setting: Setting) -> Setting:
    """The setting itself: thresholds and eps are too small to be rounded."""
    return SPEC.complete(setting, SPEC.name)


SPEC = MethodSpec(
    name="ota",
    shared={"power": POWER, "eps": EPS},
    per_model={"density": DENSITY, "threshold": THRESHOLD},
    canonical=canonical,
    min_models=1,
    needs=SECOND_MOMENT,
    source="OTA with FFG, github.com/pmahdavi/ota-merge",
)

METHODS = (Method(SPEC, kernel),)
