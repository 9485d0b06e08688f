"""WIDEN: weigh each column of each model by how far it moved from the base, in length and in direction.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods._gta import LAMBDA, WEIGHT
from evomerge.merge.methods._method import CHUNK, Kernel, Method, TensorInputs
from evomerge.merge.methods._vectors import (
    Part,
    add_whole,
    alone,
    fold_lambda,
    is_embedding,
    keep_base,
    parts,
)
from evomerge.recipe import MethodSpec, ParameterSpec, Setting, rounded

if TYPE_CHECKING:
    import torch

RATIO = ParameterSpec(
    low=0.0,
    default=1.0,
    doc="how many times the mean of its model a change must exceed to be important",
)
CALIBRATION = ParameterSpec(default=1.0, doc="the score of an important change")


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i s_i delta_i, s_i one score per column; per entry where there are no columns.

    For a matrix, per column j of model i: dm = |length of theta_i[:, j] - length of base[:, j]| and
    dd = 1 - their cosine. Each of the two is ranked over the columns of the model, ascending, as
    place / columns, and scored: the softmax of the ranks over the models, or `calibration` where a rank
    exceeds `ratio` times the mean rank; s_i is the mean of the two scores. Other tensors are scored entry
    by entry, |delta_i| in the place of the ranks. Embeddings (not `lm_head`) are stored with one row per
    token, so there rows take the place of columns.

    A model whose task vector is zero takes no part; two columns of zeros have the same direction, and a
    column of zeros is at a right angle to any other. Weights and lambda are ours: they scale what the scores
    have chosen; the paper has 1.

    Ranks are remembered: two values per column and model.
    """
    import torch

    rows = parts(inputs)
    if not rows:
        return keep_base
    shape = inputs.shape if len(inputs.shape) == 2 else (1, inputs.base.numel())
    axis = 1 if len(inputs.shape) == 2 and is_embedding(inputs.name) else 0
    changes = torch.stack([changes_of(inputs, part, axis) for part in rows])
    scores = scored(changes, inputs.parameter("ratio"), inputs.parameter("calibration"))
    merged = torch.zeros(shape, dtype=inputs.dtype, device=inputs.base.device)
    for part, score in zip(rows, scores, strict=True):
        factor = (score * (inputs.parameter("lambda") * part.weight)).unsqueeze(axis)
        merged.addcmul_(part.delta.reshape(shape), factor)
    return add_whole(merged)


def changes_of(inputs: TensorInputs, part: Part, axis: int) -> torch.Tensor:
    """`(2, columns)` ranks of a matrix, `(1, n)` magnitudes of any other tensor."""
    if len(inputs.shape) != 2:
        return part.delta.abs().reshape(1, -1)
    return inputs.once(("widen", part.model), lambda: ranks(inputs, part.delta, axis))


def scored(changes: torch.Tensor, ratio: float, calibration: float) -> torch.Tensor:
    """Scores `(models, columns)` of changes `(models, kinds of change, columns)`, the mean over the kinds."""
    import torch

    important = changes > ratio * changes.mean(dim=2, keepdim=True)
    shares = torch.softmax(changes, dim=0)
    return shares.masked_fill_(important, calibration).mean(dim=1)


def ranks(inputs: TensorInputs, delta: torch.Tensor, axis: int) -> torch.Tensor:
    """Ranks `(2, columns)` of the changes of length and of direction; vectors run along `axis`.

    A fine-tuned column has nearly the direction of the base's, so lengths and cosines are float64.
    """
    import torch

    base_matrix, delta_matrix = inputs.base.reshape(inputs.shape), delta.reshape(inputs.shape)
    columns = inputs.shape[1 - axis]
    sums = torch.zeros(3, columns, dtype=torch.float64, device=delta.device)
    step = max(1, CHUNK // inputs.shape[1])
    for low in range(0, inputs.shape[0], step):
        here = base_matrix[low : low + step].to(inputs.dtype)
        there = (here + delta_matrix[low : low + step]).double()
        here = here.double()
        part = torch.stack([(x * y).sum(dim=axis) for x, y in ((here, here), (there, there), (here, there))])
        if axis == 0:
            sums += part
        else:
            sums[:, low : low + step] = part
    before, after = sums[0].sqrt(), sums[1].sqrt()
    cosine = sums[2] / (before * after).clamp(min=torch.finfo(torch.float64).tiny)
    cosine[(before == 0.0) & (after == 0.0)] = 1.0
    order = torch.stack([(after - before).abs(), 1.0 - cosine]).argsort(dim=1, stable=True)
    places = torch.arange(columns, dtype=inputs.dtype, device=delta.device) / columns
    return torch.empty_like(order, dtype=inputs.dtype).scatter_(1, order, places.expand(2, -1))


def canonical(setting: Setting) -> Setting:
    """`lambda` folded into the weights; one model that is scored 1 throughout is task arithmetic."""
    setting = fold_lambda(SPEC.complete(setting, SPEC.name))
    if len(setting.models) == 1 and rounded(setting.parameters["calibration"]) == 1.0:
        return alone(setting)
    return setting


SPEC = MethodSpec(
    name="widen",
    shared={"lambda": LAMBDA, "ratio": RATIO, "calibration": CALIBRATION},
    per_model={"weight": WEIGHT},
    canonical=canonical,
    unchanged_is_absent=True,
    source="Yu 2024, arXiv:2408.03092, and the authors' code",
)

METHODS = (Method(SPEC, kernel),)
