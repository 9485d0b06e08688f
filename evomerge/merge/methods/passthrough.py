"""Passthrough: one model, or the base, as it is or scaled.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch


def kernel(inputs: TensorInputs) -> Kernel:
    """Scale * theta."""
    (delta,), (scale,) = inputs.deltas, inputs.values("scale")

    def run(low: int, high: int, out: torch.Tensor) -> None:
        if delta is not None:
            out.add_(delta[low:high])
        out.mul_(scale)

    return run


def keeps_base(setting: Setting) -> bool:
    """Only a scale of 1 does."""
    return all(values["scale"] == 1.0 for values in setting.models.values())


def canonical(setting: Setting) -> Setting:
    """The sum of one model, which `linear` gives to the last bit."""
    setting = SPEC.complete(setting, SPEC.name)
    scales = {name: rounded(values["scale"]) for name, values in setting.models.items()}
    copied = all(scale == 1.0 for scale in scales.values())
    return Setting("linear", {"normalize": copied}, {name: {"weight": scales[name]} for name in scales})


SPEC = MethodSpec(
    name="passthrough",
    shared={},
    per_model={"scale": ParameterSpec(default=1.0, doc="the factor of the tensor")},
    canonical=canonical,
    min_models=1,
    max_models=1,
    mergekit="passthrough",
    source="mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, takes_base=True, keeps_base=keeps_base, streams=True),)
