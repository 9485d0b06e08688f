"""Sources under the tensor names of a model with other layers than theirs.

Every tensor of the merged model has a base of its own and, in each model, a tensor that it is made from: so
layers repeat, move and meet layers of other depths, and whoever merges sees one plain set of sources.

Imports: `evomerge.sources`; torch only when a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import TensorInfo
from evomerge.sources.source_set import SourceSet, own_or_delta, task_vector
from evomerge.sources.statistics import ModelStatistics
from evomerge.sources.streamed import TaskVector, streamed

if TYPE_CHECKING:
    import torch


class Origin(NamedTuple):
    """Where one tensor comes from.

    Attributes:
        base: the model that its task vectors count from.
        tensors: model -> name of its tensor; the base is one of them.
    """

    base: str
    tensors: Mapping[str, str]


class RenamedSources:
    """Some tensors of a `SourceSet`, under new names.

    Args:
        sources: the models.
        origins: new name -> where it comes from; a tensor's models have it in one shape.
    """

    base_name = "each tensor's own base"  # no model's name: in which tensors one is the base differs
    statistics: Mapping[str, ModelStatistics] = MappingProxyType({})  # mergekit files cannot name any

    def __init__(self, sources: SourceSet, origins: Mapping[str, Origin]) -> None:
        self._sources = sources
        self._origins = origins

    def info(self, name: str) -> TensorInfo:
        """The base's tensor."""
        origin = self._origins[name]
        return self._sources.checkpoint(origin.base).tensors[origin.tensors[origin.base]]

    def whole(self, model: str, name: str) -> torch.Tensor:
        """A model's tensor, as `SourceSet.whole` gives it."""
        return self._sources.whole(model, self._origins[name].tensors[model])

    def base_tensor(self, name: str) -> torch.Tensor:
        """The tensor of its base; float32 where an adapter changes it, otherwise as stored."""
        return self.whole(self._origins[name].base, name)

    def delta(self, model: str, name: str) -> torch.Tensor | None:
        """The float32 task vector of one model; None where it has the base's tensor."""
        base, tensors = self._origins[name]
        if model == base or not self.info(name).floating:
            return None
        if base == self._sources.base_name and tensors[base] == tensors[model]:
            return self._sources.delta(model, tensors[model])
        return task_vector(self.whole(model, name), self.base_tensor(name))

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor | None:
        """The same, flat; or the model's own entries, as `SourceSet.held` gives them."""
        if model == self._origins[name].base or not self.info(name).floating:
            return None
        if isinstance(self._sources.sources.get(model), Adapter):
            delta = self.delta(model, name)
            return None if delta is None else delta.reshape(-1)
        return own_or_delta(self.whole(model, name).reshape(-1), base)

    def streamed_delta(self, model: str, name: str, base: torch.Tensor) -> TaskVector | None:
        """The same, flat; read slice by slice where no adapter makes it."""
        origin = self._origins[name]
        if model == origin.base:
            return None
        if isinstance(self._sources.sources.get(model), Adapter):
            delta = self.delta(model, name)
            return None if delta is None else delta.reshape(-1)
        return streamed(self._sources.checkpoint(model), origin.tensors[model], base)
