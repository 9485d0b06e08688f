"""PCB-merging: entries compete within a model and across models; the weakest are dropped, the rest averaged.

The authors' repository holds several variants that disagree. This is that of its root script
`pcb-merging.py`, applied to one tensor at a time; the script takes the whole model as one vector, so its
orders and ranges are those of all tensors together. Only for a model of one tensor are the two the same.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import LAMBDA, WEIGHT
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.merge.methods._vectors import add_whole, fold_lambda, keep_base, n_models, parts
from evomerge.recipe import MethodSpec, ParameterSpec, Setting

if TYPE_CHECKING:
    import torch

SMALLEST_SHARE = 1e-12  # sums of shares below this divide as this (the root script)
DENSITY = ParameterSpec(
    low=0.0, high=1.0, low_open=True, default=0.1, doc="the fraction of entries that survive the competition"
)
CLIP = ParameterSpec(low=0.0, high=0.49, default=1e-4, doc="the fraction of magnitudes clipped at either end")


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda (sum_i w_i C_i S_i) / (sum_i S_i).

    Per model, over the n entries d of its task vector: A is |d| clipped to its sorted entries int(n clip)
    and int(n (1 - clip) - 1); C = sign(d) A; B = exp(N unit(A)^2) tanh(d sum_j d_j), unit(x) = (x - min) /
    (max - min); S = unit(max(B, sorted B at int(n (1 - density)))), so about 1 - density of the entries
    have a share S of exactly 0. `unit` of equal values is 0; where all that survives is equal, its share is
    1 if B > 0.

    Weights are ours, w_i C_i in the place of C_i as in the authors' evolutionary variant; the root script
    has w_i = 1. Memory while a tensor is merged: about six times the tensor.
    """
    import torch

    rows, models = parts(inputs), n_models(inputs)
    if not rows:
        return keep_base
    total, merged, shares = (torch.zeros_like(rows[0].delta) for _ in range(3))
    for part in rows:
        total += part.delta
    for model, delta, weight in rows:
        size = clipped(inputs, model, delta)
        # divided by exp(N), which the shares do not see: exp of many models would overflow
        intra = torch.exp_(unit(size).square_().sub_(1.0).mul_(models))
        share = survivors(torch.tanh_(delta * total).mul_(intra), inputs.parameter("density"))
        shares += share
        merged += size.copysign_(delta).mul_(delta != 0.0).mul_(share).mul_(weight)
    return add_whole(merged.div_(shares.clamp_(min=SMALLEST_SHARE)).mul_(inputs.parameter("lambda")))


def clipped(inputs: TensorInputs, model: str, delta: torch.Tensor) -> torch.Tensor:
    """|delta| without its outliers; the two bounds are remembered."""
    clip, n = inputs.parameter("clip"), delta.numel()
    size = delta.abs()
    places = int(n * clip), max(0, int(n * (1.0 - clip) - 1))
    low, high = inputs.once(("pcb", model, places), lambda: tuple(at(size, place) for place in places))
    return size.clamp_(low, high)


def at(values: torch.Tensor, place: int) -> float:
    """Entry `place`, from 0, of the sorted values."""
    return float(values.kthvalue(place + 1).values)


def unit(values: torch.Tensor) -> torch.Tensor:
    """`values` mapped to [0, 1] by their range; 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low).div_(high - low) if high > low else values * 0.0


def survivors(balance: torch.Tensor, density: float) -> torch.Tensor:
    """The shares S of the balances B."""
    n = balance.numel()
    cut, high = at(balance, min(int(n * (1.0 - density)), n - 1)), float(balance.max())
    if high > cut:
        return balance.clamp_(min=cut).sub_(cut).div_(high - cut)
    return ((balance >= high) & (balance > 0.0)).to(balance.dtype)


def canonical(setting: Setting) -> Setting:
    """`lambda` folded into the weights."""
    return fold_lambda(SPEC.complete(setting, SPEC.name))


SPEC = MethodSpec(
    name="pcb",
    shared={"lambda": LAMBDA, "density": DENSITY, "clip": CLIP},
    per_model={"weight": WEIGHT},
    canonical=canonical,
    source="Du 2024, arXiv:2410.02396; the authors' pcb-merging.py, per tensor",
)

METHODS = (Method(SPEC, kernel),)
