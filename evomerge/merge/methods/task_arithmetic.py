"""Task arithmetic: the base plus a weighted sum of task vectors.

Imports: `evomerge.recipe`; no torch.
"""

from __future__ import annotations

from evomerge.merge.methods._gta import LAMBDA, WEIGHT, canonical_sum, gta, normalize
from evomerge.merge.methods._method import Kernel, Method, TensorInputs
from evomerge.recipe import MethodSpec, Setting


def kernel(inputs: TensorInputs) -> Kernel:
    """base + lambda sum_i w_i delta_i; `normalize` divides the sum by sum_i w_i."""
    return gta(inputs, sparsify=None, consensus=False)


def canonical(setting: Setting) -> Setting:
    """`lambda` and the divisor folded into the weights."""
    return canonical_sum(SPEC.complete(setting, SPEC.name))


SPEC = MethodSpec(
    name="task_arithmetic",
    shared={"lambda": LAMBDA, "normalize": normalize(False)},
    per_model={"weight": WEIGHT},
    canonical=canonical,
    unchanged_is_absent=True,
    mergekit="task_arithmetic",
    source="Ilharco 2022, arXiv:2212.04089",
)

METHODS = (Method(SPEC, kernel, streams=True, compiled=True),)
