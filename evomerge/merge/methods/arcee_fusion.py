"""Arcee Fusion: take the model's entries where the change is unusually important, the base's elsewhere.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.merge.methods._gram import Split
from evomerge.merge.methods._method import CHUNK, Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, Setting

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

EPSILON = 1e-8  # added to every probability


@dataclass(frozen=True)
class Importance:
    """What decides about an entry: |delta| * divergence of its row >= threshold.

    Attributes:
        divergence: `(rows,)` in the working dtype.
        threshold: median + 1.5 (third quartile - first quartile) of all importances.
    """

    divergence: torch.Tensor
    threshold: float

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(self.divergence.nbytes)


def kernel(inputs: TensorInputs) -> Kernel:
    """theta where |delta| KL(row) >= median + 1.5 (Q3 - Q1) of these products, else base.

    KL(row) = sum_j p_j log(p_j / q_j), with p and q the softmax of the row of the model and of the base,
    each + 1e-8, summed in float64; rows run along the last dimension. mergekit sums in float32, with an error
    of some 2**-22: where models are so close that KL is not far above that, it chooses by rounding.

    Quantiles are the entries at int(q (n - 1)) of the sorted products. They are exact here for any n; above
    1e6 entries mergekit takes them from a random sample, so that the two differ near the threshold. One
    number per row is remembered; the threshold is found once, with all products of the tensor in memory.
    """
    import torch

    (delta,) = inputs.deltas
    if delta is None:
        return lambda low, high, out: None
    split = Split.by_last_dimension(inputs.shape)
    found = inputs.once(("fusion", *inputs.models), lambda: measure(inputs, delta, split))
    scratch = inputs.scratch(1)[0]

    def run(low: int, high: int, out: torch.Tensor) -> None:
        score = torch.abs(delta[low:high], out=scratch[: high - low])
        score.mul_(found.divergence[split.vector_of(low, high, out)])
        out.add_(delta[low:high].masked_fill(score < found.threshold, 0.0))

    return run


def measure(inputs: TensorInputs, delta: TaskVector, split: Split) -> Importance:
    """The divergence of every row, and the threshold over all entries."""
    import torch

    shape = (split.rows, split.columns)
    base, change = inputs.base.view(shape), delta[:].view(shape)
    divergence = torch.empty(split.rows, dtype=inputs.dtype, device=delta.device)
    scores = torch.empty_like(change)
    height = max(1, CHUNK // split.columns)
    for rows in (slice(top, top + height) for top in range(0, split.rows, height)):
        origin = base[rows].to(inputs.dtype)
        p = torch.softmax((origin + change[rows]).double(), -1) + EPSILON
        q = torch.softmax(origin.double(), -1) + EPSILON
        divergence[rows] = (p * (p / q).log()).sum(-1).to(inputs.dtype)
        torch.mul(change[rows].abs(), divergence[rows, None], out=scores[rows])
    flat, last = scores.view(-1), scores.numel() - 1
    low, middle, high = (float(flat.kthvalue(1 + last * quarter // 4).values) for quarter in (1, 2, 3))
    return Importance(divergence, middle + 1.5 * (high - low))


def canonical(setting: Setting) -> Setting:
    """The setting itself."""
    return SPEC.complete(setting, SPEC.name)


SPEC = MethodSpec(
    name="arcee_fusion",
    shared={},
    per_model={},
    canonical=canonical,
    min_models=1,
    max_models=1,
    unchanged_is_absent=True,
    mergekit="arcee_fusion",
    source="mergekit 0.1.5, with exact quantiles",
)

METHODS = (Method(SPEC, kernel, streams=True),)
