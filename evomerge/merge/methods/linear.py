"""Linear merge: the weighted average of whole models (model soup).

Imports: `evomerge.recipe`, `evomerge.errors`; torch inside functions only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.errors import RecipeError
from evomerge.merge.methods._gta import WEIGHT
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

SMALLEST_SUM = 1e-8  # weights that sum to less than this in absolute value cannot be normalised


def kernel(inputs: TensorInputs) -> Kernel:
    """sum_i w_i theta_i, divided by sum_i w_i when `normalize` is true, with theta_i = base + delta_i.

    The order of operations is mergekit's, so that float32 results agree to the last bit: a zero accumulator,
    one multiply-add per model in order, one division by the sum of the weights in the working dtype.

    Raises:
        RecipeError: `normalize` is true and the weights sum to zero.
    """
    import torch

    factors = torch.tensor(inputs.values("weight"), dtype=inputs.dtype, device=inputs.base.device)
    divisor = float(factors.sum()) if inputs.parameter("normalize") else 1.0
    if abs(divisor) < SMALLEST_SUM:
        raise RecipeError(
            f"{inputs.where}: the weights of linear sum to {divisor:g}, and an average divides by that sum; "
            "change a weight or set `normalize` to false"
        )
    return LinearKernel(factors, tuple(inputs.deltas), divisor, inputs.scratch(2))


@dataclass(frozen=True)
class LinearKernel:
    """sum_i f_i theta_i / divisor, added from the first model to the last.

    Attributes:
        factors: `(N,)` f_i.
        deltas: theta_i - base.
        divisor: of the sum.
        scratch: `(2, m)` buffers.
    """

    factors: torch.Tensor
    deltas: tuple[TaskVector | None, ...]
    divisor: float
    scratch: torch.Tensor

    def __call__(self, low: int, high: int, out: torch.Tensor) -> None:
        """See `Kernel`."""
        import torch

        total, source = self.scratch[:, : high - low]
        total.zero_()
        for factor, delta in zip(self.factors.unbind(), self.deltas, strict=True):
            theta = out if delta is None else torch.add(out, delta[low:high], out=source)
            total.addcmul_(theta, factor)
        out.copy_(total if self.divisor == 1.0 else total.div_(self.divisor))


def keeps_base(setting: Setting) -> bool:
    """Averages of the base are the base; a sum of weights other than 1 scales it, a sum of 0 is refused."""
    total = math.fsum(values["weight"] for values in setting.models.values())
    return abs(total) >= SMALLEST_SUM if setting.parameters["normalize"] else total == 1.0


def canonical(setting: Setting) -> Setting:
    """Weights that sum to 1 when only their ratios matter; models of weight 0 left out."""
    setting = SPEC.complete(setting, "linear")
    weights = {name: values["weight"] for name, values in setting.models.items()}
    total = math.fsum(weights.values())
    normalize = bool(setting.parameters["normalize"]) or rounded(total) == 1.0
    if normalize and abs(total) >= SMALLEST_SUM and abs(total - 1.0) > 1e-6 * len(weights):
        weights = {name: weight / total for name, weight in weights.items()}
    weights = {name: rounded(weight) for name, weight in weights.items()}
    kept = {name: weight for name, weight in weights.items() if weight != 0.0} or weights
    if normalize and len(kept) == 1 and any(kept.values()):
        kept = dict.fromkeys(kept, 1.0)
    return Setting(
        "linear", {"normalize": normalize}, {name: {"weight": weight} for name, weight in kept.items()}
    )


SPEC = MethodSpec(
    name="linear",
    shared={"normalize": ParameterSpec(kind="bool", default=True, doc="divide by the sum of the weights")},
    per_model={"weight": WEIGHT},
    canonical=canonical,
    min_models=1,
    mergekit="linear",
    source="Wortsman 2022, arXiv:2203.05482; arithmetic of mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, takes_base=True, keeps_base=keeps_base, streams=True, compiled=True),)
