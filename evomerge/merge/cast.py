"""Merging into another dtype than the base's: merged in float32, rounded once.

Imports: torch, `evomerge.errors`, `evomerge.sources`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch

from evomerge.errors import RecipeError
from evomerge.merge.merger import Merger, TensorSources
from evomerge.merge.plan import MergePlan
from evomerge.sources.source_set import SourceSet
from evomerge.sources.statistics import ModelStatistics
from evomerge.sources.streamed import TaskVector


@dataclass(frozen=True)
class Float32Sources:
    """Sources whose base is read as float32, so that merged tensors are not rounded to its dtype."""

    sources: TensorSources

    @property
    def base_name(self) -> str:
        """Name of the base model in recipes."""
        return self.sources.base_name

    @property
    def statistics(self) -> Mapping[str, ModelStatistics]:
        """What models carry beside their weights."""
        return self.sources.statistics

    def base_tensor(self, name: str) -> torch.Tensor:
        """The base's tensor, in float32 if it is floating."""
        tensor = self.sources.base_tensor(name)
        return tensor.float() if tensor.is_floating_point() else tensor

    def delta(self, model: str, name: str) -> torch.Tensor | None:
        """The float32 task vector."""
        return self.sources.delta(model, name)

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor | None:
        """The float32 task vector, flat: the base is float32."""
        return self.sources.held(model, name, base)

    def streamed_delta(self, model: str, name: str, base: torch.Tensor) -> TaskVector | None:
        """The float32 task vector by slices."""
        return self.sources.streamed_delta(model, name, base)


class CastMerge:
    """Merges one plan; called with names, it yields the tensors in `dtype`, or in the base's for None.

    Args:
        sources: of the plan.
        plan: what to merge.
        dtype: torch name of a floating dtype; tensors that are not floating keep theirs.
    """

    def __init__(self, sources: SourceSet, plan: MergePlan, dtype: str | None = None) -> None:
        self._plan, self._dtype = plan, dtype
        self._merger = Merger(sources if dtype is None else Float32Sources(sources))

    def __call__(self, names: Set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, in the base checkpoint's order.

        Raises:
            RecipeError: as `Merger.materialize`, and for values that `dtype` cannot hold.
        """
        for name, tensor in self._merger.materialize(self._plan, names):
            yield name, cast(tensor, self._dtype, f"tensor `{name}`")


def cast(tensor: torch.Tensor, dtype: str | None, where: str) -> torch.Tensor:
    """`tensor` in torch's `dtype`; itself for None, and if it is not floating.

    Raises:
        RecipeError: it has values that the dtype cannot hold.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor
    result = tensor.to(getattr(torch, dtype))
    if dtype == "float16" and not result.isfinite().all():
        raise RecipeError(
            f"{where} has values that float16 cannot hold; write bfloat16 or float32 (`--dtype`, or "
            "`out_dtype` in a mergekit file)"
        )
    return result
