"""NuSLERP: spherical interpolation of two models, or of two task vectors, at any angle.

Unlike `slerp` it takes weights, can work on task vectors, and has no threshold below which it becomes linear
but that of rounding. A vector is the whole tensor, or one row or column of it.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gram import FORM, TASK_VECTORS, Split, combination, gram
from evomerge.merge.methods._gta import WEIGHT
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

SMALLEST_SUM = 1e-6  # weights that sum to less than this in absolute value mean t = 0.5
SMALLEST_NORM = 1e-7  # shorter vectors are divided by this
# 1 - cosine^2 up to here: interpolate on the line; rounding takes opposite vectors past mergekit's 1e-16
PARALLEL = 1e-15


def kernel(inputs: TensorInputs) -> Kernel:
    """[sin((1-t) th) a + sin(t th) b] / sin th with t = w_b / (w_a + w_b), th the angle between a and b.

    a and b are the models' vectors; with `task_vectors` their differences from the base, which is added.
    """
    whole = not inputs.parameter(TASK_VECTORS)
    split = Split.flat(inputs.shape)
    if not inputs.parameter("nuslerp_flatten"):
        by_columns = inputs.parameter("nuslerp_row_wise")
        split = (Split.by_first_dimension if by_columns else Split.by_last_dimension)(inputs.shape)
    factors = coefficients(gram(inputs, split, whole=whole), share(*inputs.values("weight")))
    return combination(inputs, split, factors, whole=whole)


def share(first: float, second: float) -> float:
    """The t of two weights."""
    total = first + second
    return 0.5 if abs(total) < SMALLEST_SUM else second / total


def coefficients(products: torch.Tensor, t: float) -> torch.Tensor:
    """`(2, k)` factors of a and of b from their `(2, 2, k)` dot products."""
    import torch

    length_a, length_b = (products[i, i].sqrt().clamp(min=SMALLEST_NORM) for i in range(2))
    cosine = (products[0, 1] / length_a / length_b).clamp(-1.0, 1.0)
    parallel = 1.0 - cosine**2 <= PARALLEL
    theta = cosine.acos()
    sine = theta.sin().masked_fill(parallel, 1.0)
    arc = torch.stack([((1.0 - t) * theta).sin() / sine, (t * theta).sin() / sine])
    line = torch.tensor([[1.0 - t], [t]], dtype=arc.dtype, device=arc.device)
    # the ends are copies, exactly, which a quotient of sines is not
    return line.expand_as(arc) if t in (0.0, 1.0) else torch.where(parallel, line, arc)


def canonical(setting: Setting) -> Setting:
    """Weights that sum to 1; both ends of the arc are copies of one model."""
    setting = SPEC.complete(setting, SPEC.name)
    first, second = setting.models
    t = rounded(share(*(values["weight"] for values in setting.models.values())))
    if t in (0.0, 1.0):
        end = second if t else first
        return Setting("linear", {"normalize": True}, {end: {"weight": 1.0}})
    shared = dict(setting.parameters)
    if shared["nuslerp_flatten"]:
        shared["nuslerp_row_wise"] = False
    return Setting(SPEC.name, shared, {first: {"weight": rounded(1.0 - t)}, second: {"weight": t}})


SPEC = MethodSpec(
    name="nuslerp",
    shared={
        TASK_VECTORS: FORM,
        "nuslerp_flatten": ParameterSpec(
            kind="bool", default=True, doc="take the whole tensor as one vector"
        ),
        "nuslerp_row_wise": ParameterSpec(
            kind="bool",
            default=False,
            doc="where tensors are not flattened: vectors along the first dimension, which are the columns "
            "of a matrix (out, in), instead of along the last; the name is mergekit's",
        ),
    },
    per_model={"weight": WEIGHT},
    canonical=canonical,
    min_models=2,
    max_models=2,
    mergekit="nuslerp",
    source="Shoemake 1985; arithmetic of mergekit 0.1.5",
)

METHODS = (Method(SPEC, kernel, streams=True),)
