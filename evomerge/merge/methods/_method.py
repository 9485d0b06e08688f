"""What a merge method is: a spec, and a function from one tensor's inputs to a kernel.

A merge has two stages. First the method looks at whole tensors and settles every number that depends on all
of their entries (norms, thresholds, masks); that stage returns a `Kernel`. The kernel then merges any range
of entries on its own, so the caller walks a tensor in chunks that stay in cache, in any order, and gets the
same bits whatever the chunk size.

Everything is computed in `TensorInputs.dtype`, float32 in the merger; norms accumulate in float64.

Imports: `evomerge.recipe`; torch inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from evomerge.recipe import MethodSpec, Setting

if TYPE_CHECKING:
    import torch

    from evomerge.sources.streamed import TaskVector

T = TypeVar("T")

# torch splits an elementwise CPU operation over threads from 32,768 entries on, so sums in blocks just below
# that do not depend on the number of threads.
CHUNK = 32_000

# `kernel(low, high, out)`: `out` holds the base entries [low, high) of the flat tensor in the working dtype
# and is overwritten with the merged ones.
Kernel = Callable[[int, int, "torch.Tensor"], None]


class Once(Protocol):
    """`once(key, compute)`: the value of `compute()`, which depends on the sources of this tensor only."""

    def __call__(self, key: Hashable, compute: Callable[[], T]) -> T: ...


class Statistics(Protocol):
    """What models carry beside their weights, for methods that declare `needs`; by place in `deltas`."""

    def __call__(self, index: int, kind: str) -> torch.Tensor | None:
        """Those of this tensor in `dtype`, shaped as `sources.statistics` says; None where there are none."""
        ...

    def rms(self, index: int, kind: str) -> float:
        """Root mean square over the entries of all tensors of the model that have statistics of `kind`."""
        ...


class NoStatistics:
    """The `Statistics` of models that carry none."""

    def __call__(self, index: int, kind: str) -> torch.Tensor | None:
        """None."""
        return None

    def rms(self, index: int, kind: str) -> float:
        """0."""
        return 0.0


NO_STATISTICS = NoStatistics()


def compute_again(key: Hashable, compute: Callable[[], T]) -> T:
    """The `Once` that remembers nothing."""
    return compute()


@dataclass(frozen=True)
class TensorInputs:
    """All that a method may look at to merge one tensor.

    Attributes:
        base: flat base tensor, `(n,)`, any floating dtype.
        deltas: flat task vectors, `(n,)` in `dtype`, one per model in the setting's order; None is zero.
            A method that `streams` may find some whose slices are read from a file at every access.
        setting: the complete setting of the tensor's cell; its models are in the order of `deltas`.
        dtype: the dtype to compute in, float32 or float64.
        shape: shape of the tensor, for methods that work on rows or matrices.
        seeds: one seed per model in [0, 2**32), empty for methods that are not random.
        where: cell and tensor, for messages.
        name: the tensor's name, for methods that treat embeddings apart.
        chunk: the kernel is never asked for more entries than this at once.
        once: remembers what depends only on sources, from one candidate to the next.
        statistics: of the models, for a method whose spec `needs` them.
    """

    base: torch.Tensor
    deltas: Sequence[TaskVector | None]
    setting: Setting
    dtype: torch.dtype
    shape: tuple[int, ...]
    seeds: Sequence[int] = ()
    where: str = "tensor"
    name: str = ""
    chunk: int = CHUNK
    once: Once = compute_again
    statistics: Statistics = NO_STATISTICS

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order of `deltas`."""
        return tuple(self.setting.models)

    def values(self, name: str) -> list[float]:
        """One parameter of every model, in the order of `deltas`."""
        return [values[name] for values in self.setting.models.values()]

    def parameter(self, name: str) -> Any:
        """A shared parameter."""
        return self.setting.parameters[name]

    def scratch(self, rows: int) -> torch.Tensor:
        """`(rows, m)` uninitialised buffers in the working dtype, m large enough for any chunk."""
        import torch

        size = min(self.chunk, self.base.numel())
        return torch.empty((rows, size), dtype=self.dtype, device=self.base.device)


def always(setting: Setting) -> bool:
    """The usual `Method.keeps_base`."""
    return True


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        spec: what can be known without tensors.
        kernel: settles what needs whole tensors and returns the rest as a `Kernel`; pure.
        takes_base: whether the base model may be named among the models of a setting.
        keeps_base: whether, in a setting, models that equal the base merge to the base itself.
        streams: whether the method takes slices of task vectors and nothing else, so that merging large
            models needs no whole one in memory.
        compiled: whether `evomerge.merge.fused` carries its kernels out: it may be given a `RawDelta`.
    """

    spec: MethodSpec
    kernel: Callable[[TensorInputs], Kernel]
    takes_base: bool = False
    keeps_base: Callable[[Setting], bool] = always
    streams: bool = False
    compiled: bool = False

    def merge(self, inputs: TensorInputs) -> torch.Tensor:
        """The merged tensor, shaped `inputs.shape`, in `inputs.dtype`.

        Raises:
            RecipeError: the setting has no merge, as `linear` with weights that sum to zero.
        """
        merged = inputs.base.reshape(-1).to(inputs.dtype, copy=True)
        kernel = self.kernel(inputs)
        for low in range(0, merged.numel(), inputs.chunk):
            high = min(low + inputs.chunk, merged.numel())
            kernel(low, high, merged[low:high])
        return merged.reshape(inputs.shape)
