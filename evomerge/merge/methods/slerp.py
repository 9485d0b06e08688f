"""Spherical interpolation of two models, each tensor taken as one flat vector.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from evomerge.merge.methods._method import CHUNK, Kernel, Method, TensorInputs
from evomerge.recipe import BASE_COPY, MethodSpec, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

NEARLY_PARALLEL = 0.9995  # |cosine| above this: interpolate on the line (mergekit's DOT_THRESHOLD)
TINY = 1e-8  # vectors no longer than this are not normalised


class Angle(NamedTuple):
    """Norms of two vectors and their dot product, in float64."""

    norm_a: float
    norm_b: float
    dot: float


def kernel(inputs: TensorInputs) -> Kernel:
    """[sin((1-t) th) a + sin(t th) b] / sin th, th the angle between a and b; a line when nearly parallel.

    With one model, a is the base and b the model; with two, a is the first and b the second. The vectors
    are combined with their own lengths: the length of the result is not interpolated.
    """
    first, second = (None, *inputs.deltas)[-2:]
    key = ("angle", *inputs.models)
    angle = inputs.once(key, lambda: measure(inputs.base, first, second, inputs.dtype))
    weight_a, weight_b = coefficients(angle, inputs.parameter("t"))

    def run(low: int, high: int, out: torch.Tensor) -> None:
        # a = base + first and b = base + second, so the base has both weights
        out.mul_(weight_a + weight_b)
        if first is not None:
            out.add_(first[low:high], alpha=weight_a)
        if second is not None:
            out.add_(second[low:high], alpha=weight_b)

    return run


def coefficients(angle: Angle, t: float) -> tuple[float, float]:
    """The factors of a and of b."""
    length_a, length_b = (norm if norm > TINY else 1.0 for norm in (angle.norm_a, angle.norm_b))
    cosine = min(1.0, max(-1.0, angle.dot / length_a / length_b))
    if abs(cosine) > NEARLY_PARALLEL:
        return 1.0 - t, t
    theta = math.acos(cosine)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def measure(
    base: torch.Tensor, first: TaskVector | None, second: TaskVector | None, dtype: torch.dtype
) -> Angle:
    """`Angle` of base + first and base + second, all `(n,)`; None is a zero task vector."""
    import torch

    sums = torch.zeros(3, dtype=torch.float64, device=base.device)
    for low in range(0, base.numel(), CHUNK):
        part = slice(low, low + CHUNK)
        origin = base[part].to(dtype)
        a = (origin if first is None else origin + first[part]).double()
        b = (origin if second is None else origin + second[part]).double()
        sums += torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()])
    aa, bb, ab = sums.tolist()
    return Angle(math.sqrt(aa), math.sqrt(bb), ab)


def canonical(setting: Setting) -> Setting:
    """Both ends of the arc are copies: of the base, or of one model."""
    setting = SPEC.complete(setting, "slerp")
    t = rounded(setting.parameters["t"])
    ends = (None, *setting.models)[-2:]
    if t not in (0.0, 1.0):
        return Setting("slerp", {"t": t}, setting.models)
    end = ends[int(t)]
    return BASE_COPY if end is None else Setting("linear", {"normalize": True}, {end: {"weight": 1.0}})


SPEC = MethodSpec(
    name="slerp",
    shared={"t": ParameterSpec(doc="the way from the first model (or the base) at 0 to the last at 1")},
    per_model={},
    canonical=canonical,
    min_models=1,
    max_models=2,
    mergekit="slerp",
    source="Shoemake 1985; arithmetic of mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, takes_base=True, streams=True),)
