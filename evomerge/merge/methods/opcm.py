"""OPCM, per tensor: task vectors are added one after the other, each without what the sum already holds.

The authors rescale the whole model after every step, so that the length of its task vector is the mean of
those merged so far. Every step first undoes the rescaling of the one before, so only the last one shows in
the result: one factor. Here it is taken per tensor, over the tensor's own task vectors, and the method is
named after that: the factor of the whole model would need all tensors merged before the first is written.
For a model of one tensor the two are the same.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import LAMBDA, canonical_sum
from evomerge.merge.methods._method import CHUNK, Kernel, Method, TensorInputs
from evomerge.merge.methods._spectral import decompose, works_on
from evomerge.merge.methods._vectors import add_whole, keep_base
from evomerge.recipe import BASE_COPY, MethodSpec, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

ALPHA = ParameterSpec(
    low=0.0,
    high=1.0,
    default=0.5,
    doc="the share of the sum's singular values whose directions later models may not change",
)


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda (g / |A_N|) A_N with A_1 = delta_1 and A_t = A_(t-1) + U Z V^T, in the models' order.

    U S V^T is the SVD of A_(t-1), r the first place, from 0, at which the running sum of S / sum(S) exceeds
    alpha (the last for alpha 1), and Z = U^T delta_t V without its diagonal and without its leading r x r
    block; g is the mean of the lengths |delta_i|. Only directions of the numerical rank of A_(t-1) count:
    others are arbitrary. A tensor that is no matrix, an embedding or an output head gets A_t = A_(t-1) +
    delta_t. lambda is ours.

    One SVD of the whole matrix per model after the first, for every candidate with a new alpha.

    Raises:
        RecipeError: a task vector has values that are not finite.
    """
    deltas = [delta[:].reshape(inputs.shape) for delta in inputs.deltas if delta is not None]
    if not deltas:
        return keep_base
    spectral, alpha = works_on(inputs), inputs.parameter("alpha")
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + (projected(delta, total, alpha, inputs.where) if spectral else delta)
    size = length(total)
    if not size:
        return keep_base
    lengths = [length(delta) for delta in deltas] + [0.0] * (len(inputs.deltas) - len(deltas))
    return add_whole(total * (inputs.parameter("lambda") * (fmean(lengths) / size)))


def projected(delta: torch.Tensor, total: torch.Tensor, alpha: float, where: str) -> torch.Tensor:
    """U Z V^T, as `delta` minus the entries s_ab u_a v_b^T of U^T delta V that Z leaves out."""
    import torch

    if not total.any():
        return delta
    u, s, vh = decompose(total, where)
    shares = s.double().cumsum(0) / s.double().sum()
    r = min(int((shares <= alpha).sum()), len(s) - 1)
    core = u.mT @ delta @ vh.mT
    left_out = torch.diag(core.diagonal())
    left_out[:r, :r] = core[:r, :r]
    return delta - u @ left_out @ vh


def length(tensor: torch.Tensor) -> float:
    """Root of the sum of squares, in float64 in blocks of CHUNK."""
    flat = tensor.reshape(-1)
    parts = (flat[low : low + CHUNK].double() for low in range(0, flat.numel(), CHUNK))
    return math.sqrt(math.fsum(float(part.square().sum()) for part in parts))


def canonical(setting: Setting) -> Setting:
    """The base for `lambda` 0; one model is task arithmetic."""
    setting = SPEC.complete(setting, SPEC.name)
    scale = rounded(setting.parameters["lambda"])
    if not scale:
        return BASE_COPY
    if len(setting.models) == 1:
        alone = {name: {"weight": 1.0} for name in setting.models}
        return canonical_sum(Setting("task_arithmetic", {"lambda": scale, "normalize": False}, alone))
    return setting


SPEC = MethodSpec(
    name="opcm_per_tensor",
    shared={"alpha": ALPHA, "lambda": LAMBDA},
    per_model={},
    canonical=canonical,
    min_models=1,
    source="Tang 2025, arXiv:2501.09522 (OPCM), and the authors' code; lengths per tensor",
)

METHODS = (Method(SPEC, kernel),)
