"""NearSwap: move every entry of the base toward the model's, by at most `t`.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import BASE_COPY, MethodSpec, ParameterSpec, Setting

if TYPE_CHECKING:
    import torch

SMALLEST_DIFFERENCE = 1e-6  # smaller differences count as this


def kernel(inputs: TensorInputs) -> Kernel:
    """c theta + (1 - c) base, per entry c = min(1, t / max(|theta - base|, 1e-6)).

    The order of operations is mergekit's, so that float32 results agree to the last bit.
    """
    import torch

    (delta,) = inputs.deltas
    if delta is None:
        return lambda low, high, out: None
    scratch = inputs.scratch(2)
    most = inputs.parameter("t")

    def run(low: int, high: int, out: torch.Tensor) -> None:
        share, theta = scratch[:, : high - low]
        torch.add(out, delta[low:high], out=theta)
        torch.sub(out, theta, out=share).abs_().clamp_(min=SMALLEST_DIFFERENCE)
        share.reciprocal_().mul_(most).clamp_(max=1.0)
        theta.mul_(share)
        out.mul_(share.neg_().add_(1.0)).add_(theta)

    return run


def canonical(setting: Setting) -> Setting:
    """The base for t = 0."""
    setting = SPEC.complete(setting, SPEC.name)
    return BASE_COPY if setting.parameters["t"] == 0.0 else setting


SPEC = MethodSpec(
    name="nearswap",
    shared={"t": ParameterSpec(low=0.0, doc="the most that an entry moves")},
    per_model={},
    canonical=canonical,
    min_models=1,
    max_models=1,
    unchanged_is_absent=True,
    mergekit="nearswap",
    source="mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, streams=True),)
