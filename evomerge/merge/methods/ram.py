"""RAM: entries that one model alone changes are kept whole, entries that several change are averaged.

A model changes an entry when its task vector exceeds `epsilon` there. RAM+ (`ramplus_tl`, tensor-local as in
mergekit: the paper counts over the whole model) multiplies the entries of one model alone by a factor that
grows with the model's ratio of shared to unique entries.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._method import CHUNK, Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting

if TYPE_CHECKING:
    import torch

Overlap = tuple[tuple[int, int], ...]  # per model, entries that it changes alone, and with others


def kernel(inputs: TensorInputs) -> Kernel:
    """base + delta_i where i alone changes the entry; base + the mean of those that change it elsewhere."""
    return _combined(inputs, [1.0] * len(inputs.deltas))


def plus_kernel(inputs: TensorInputs) -> Kernel:
    """As `kernel`, with factor_i delta_i where i alone changes the entry."""
    epsilon = inputs.parameter("epsilon")
    counts = inputs.once(("overlap", *inputs.models, epsilon), lambda: overlap(inputs, epsilon))
    r, alpha = inputs.parameter("r"), inputs.parameter("alpha")
    return _combined(inputs, [factor(alone, shared, epsilon, r, alpha) for alone, shared in counts])


def factor(alone: int, shared: int, epsilon: float, r: float, alpha: float) -> float:
    """1 + r min(shared / max(alone, epsilon), alpha), in float32 as mergekit has it."""
    import torch

    if alone == 0:
        return 1.0  # there is nothing to multiply
    ratio = torch.tensor(float(shared), dtype=torch.float32) / max(float(alone), epsilon)
    return float(1.0 + r * ratio.clamp(0.0, alpha))


def overlap(inputs: TensorInputs, epsilon: float) -> Overlap:
    """How many entries each model changes alone, and how many with others."""
    import torch

    counts = torch.zeros((len(inputs.deltas), 2), dtype=torch.int64, device=inputs.base.device)
    for low in range(0, inputs.base.numel(), CHUNK):
        changed = [None if d is None else d[low : low + CHUNK].abs() > epsilon for d in inputs.deltas]
        models = sum(mask.int() for mask in changed if mask is not None)
        for row, mask in zip(counts, changed, strict=True):
            if mask is not None:
                alone = (mask & (models == 1)).sum()
                row += torch.stack([alone, mask.sum() - alone])
    return tuple((alone, shared) for alone, shared in counts.tolist())


def _combined(inputs: TensorInputs, factors: list[float]) -> Kernel:
    """The mean over the models that change an entry, or the factor of the one that does, times its delta."""
    import torch

    epsilon = inputs.parameter("epsilon")
    terms = [(delta, f) for delta, f in zip(inputs.deltas, factors, strict=True) if delta is not None]
    scaled = any(f != 1.0 for f in factors)
    scratch = inputs.scratch(4)

    def run(low: int, high: int, out: torch.Tensor) -> None:
        mix, alone, count, x = scratch[:, : high - low]
        for buffer in (mix, alone, count):
            buffer.zero_()
        for delta, _ in terms:
            count.add_(torch.hardshrink(delta[low:high], epsilon, out=x).sign_().abs_())
        count.clamp_(min=1.0)
        for delta, f in terms:
            torch.hardshrink(delta[low:high], epsilon, out=x)  # keeps |d| > epsilon
            if scaled:
                alone.add_(x, alpha=f)
            mix.add_(x.div_(count))  # divided before the sum: mergekit's order, to the last bit
        if scaled:
            torch.where(count == 1.0, alone, mix, out=mix)
        out.add_(mix)

    return run


def canonical(setting: Setting) -> Setting:
    """One model with epsilon 0 is itself."""
    setting = SPEC.complete(setting, SPEC.name)
    if setting.parameters["epsilon"] == 0.0 and len(setting.models) == 1:
        alone = {name: {"weight": 1.0} for name in setting.models}
        return Setting("task_arithmetic", {"lambda": 1.0, "normalize": False}, alone)
    return setting


def plus_canonical(setting: Setting) -> Setting:
    """Where all factors are 1 it is `ram`: r or alpha is 0, or there is one model and nothing shared."""
    setting = PLUS.complete(setting, PLUS.name)
    shared = setting.parameters
    if shared["r"] == 0.0 or shared["alpha"] == 0.0 or len(setting.models) == 1:
        return canonical(Setting(SPEC.name, {"epsilon": shared["epsilon"]}, setting.models))
    return setting


EPSILON = ParameterSpec(low=0.0, default=1e-5, doc="the size that an entry of a task vector must exceed")
SOURCE = "arXiv:2601.13572; arithmetic of mergekit 0.1.5"

SPEC = MethodSpec(
    name="ram",
    shared={"epsilon": EPSILON},
    per_model={},
    canonical=canonical,
    min_models=1,
    unchanged_is_absent=True,
    mergekit="ram",
    source=SOURCE,
)
PLUS = MethodSpec(
    name="ramplus_tl",
    shared={
        "epsilon": EPSILON,
        "r": ParameterSpec(default=0.1, doc="how fast the factor grows with the ratio of shared entries"),
        "alpha": ParameterSpec(low=0.0, default=0.2, doc="the ratio above which the factor grows no more"),
    },
    per_model={},
    canonical=plus_canonical,
    min_models=1,
    unchanged_is_absent=True,
    mergekit="ramplus_tl",
    source=SOURCE,
)

METHODS = (Method(SPEC, kernel, streams=True), Method(PLUS, plus_kernel, streams=True))
