"""Carry a `MergePlan` out: yield merged tensors one after another, in the base checkpoint's dtype.

Task vectors, and what methods derive from the sources alone (orders, norms), are kept between candidates as
far as `cache_bytes` reaches, so that a candidate costs one pass over the task vectors that it uses. Tensors
are merged in float32, in chunks that stay in the processor's cache, and cast once at the end.

Imports: torch, `evomerge.merge`, `evomerge.sources`, `evomerge.errors`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from threading import Lock
from typing import NamedTuple, Protocol, TypeVar

import torch

from evomerge.errors import RecipeError
from evomerge.merge import workers
from evomerge.merge.compiled import available
from evomerge.merge.device_pass import DevicePass, usable
from evomerge.merge.device_sources import DeviceSources
from evomerge.merge.fused import DTYPES, fits, merge
from evomerge.merge.methods import METHODS
from evomerge.merge.methods._method import CHUNK, Method, TensorInputs
from evomerge.merge.plan import MergePlan, TensorOp
from evomerge.sources.statistics import ModelStatistics, lacking
from evomerge.sources.streamed import TaskVector, from_held

T = TypeVar("T")
Read = Callable[[str, str, torch.Tensor], TaskVector | None]  # of a model, a tensor and its flat base

AHEAD_BYTES = 128 << 20  # of tensors and their sources that may be begun before they are asked for
DEVICE_CHUNK = 1 << 24  # entries per kernel call on an accelerator, where launching costs more than memory
WHOLE_BYTES = 256 << 20  # without a cache: task vectors of a tensor that are held in memory all at once


class TensorSources(Protocol):
    """What a merger reads from."""

    @property
    def base_name(self) -> str:
        """Name of the base model in recipes."""
        ...

    @property
    def statistics(self) -> Mapping[str, ModelStatistics]:
        """What models carry beside their weights; looked at by methods that need it only."""
        ...

    def base_tensor(self, name: str) -> torch.Tensor:
        """The base model's tensor, in the checkpoint's dtype; not changed by the merger."""
        ...

    def delta(self, model: str, name: str) -> torch.Tensor | None:
        """The float32 task vector of one model, None where it does not change the tensor."""
        ...

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor | None:
        """The same, flat; or the model's own entries where these and `base` are of one 16-bit dtype."""
        ...

    def streamed_delta(self, model: str, name: str, base: torch.Tensor) -> TaskVector | None:
        """As `delta`, flat, not held in memory where that is possible; `base` is the flat base tensor."""
        ...


class Merger:
    """Merges candidates from one set of sources. Not for use from several threads at once.

    Args:
        sources: the base model and the task vectors.
        device: where tensors are merged and task vectors are kept.
        cache_bytes: memory for the base, task vectors and what is derived from them. 0 keeps nothing, and
            task vectors of large tensors are read slice by slice by the methods that can: memory does not
            grow with the number of models.
        host_bytes: pinned memory for sources that find no room in a GPU's cache.
        fused: whether a GPU's own kernels may merge; if not, torch does.
    """

    def __init__(
        self,
        sources: TensorSources,
        *,
        device: torch.device | str = "cpu",
        cache_bytes: int = 0,
        host_bytes: int = 0,
        fused: bool = True,
    ) -> None:
        self._sources = sources
        self._device = torch.device(device)
        self._cache = _Cache(cache_bytes)
        self._kept: set[tuple[str, str]] = set()  # (model, tensor) seen to equal the base
        self._host_cache = _Cache(host_bytes)
        self._on_device: DevicePass | None = None
        if fused and usable(self._device):
            there = DeviceSources(sources, self._device, self._cache, self._host_cache)
            self._on_device = DevicePass(there, self._device, self._cache, self._merge, _not_finite)
        on_cpu = self._device.type == "cpu"
        self._compiled = on_cpu and available()
        threads = workers.count()
        # torch shares a chunk of more than CHUNK out over its threads; two apiece pay for waking them
        self._chunk = (CHUNK * 2 * threads if threads > 1 else CHUNK) if on_cpu else DEVICE_CHUNK

    @property
    def cached_bytes(self) -> int:
        """Memory that the cache holds now."""
        return self._cache.used

    def forget(self) -> None:
        """Give back the memory of everything kept between candidates."""
        self._cache.clear()
        self._host_cache.clear()

    @property
    def fused_on_device(self) -> bool:
        """Whether the common methods are merged by the accelerator's own kernels."""
        return self._on_device is not None

    def digest(self, op: TensorOp) -> str:
        """What the merged tensor depends on: equal digests of one merger mean equal tensors.

        That of the operation, or of the base alone as soon as the models' tensors have been read and seen to
        equal it.
        """
        kept = all((model, op.tensor) in self._kept for model in op.setting.models)
        return "base" if kept and METHODS[op.setting.method].keeps_base(op.setting) else op.digest

    def changed(self, plan: MergePlan, held: Mapping[str, str]) -> list[TensorOp]:
        """The operations whose tensors may differ from those whose `digest` is `held`, by name."""
        return [op for op in plan.ops if held.get(op.tensor) != self.digest(op)]

    def materialize(
        self, plan: MergePlan, only: Container[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` in the order of the base checkpoint.

        A tensor that the plan leaves as it is in the base is yielded without a copy: do not write to it.

        Args:
            plan: compiled for the same base model and models as the sources.
            only: names of the tensors wanted; None for all.

        Raises:
            RecipeError: the plan is for another base, a method needs statistics that a model lacks, or a
                merged tensor has values that are not finite; the message names the cell and the tensor.
        """
        if plan.base != self._sources.base_name:
            raise RecipeError(
                f"the recipe's base model is `{plan.base}`, but the sources' is `{self._sources.base_name}`; "
                "merge the recipe with the sources that it was written for"
            )
        for op in plan.ops:
            self._check_statistics(op)
        self._cache.begin_pass()
        self._host_cache.begin_pass()
        wanted = (op for op in plan.ops if only is None or op.tensor in only)
        if self._on_device is not None:
            yield from self._on_device.run(wanted)
            return
        yield from self._in_order(wanted)

    def _in_order(self, ops: Iterable[TensorOp]) -> Iterator[tuple[str, torch.Tensor]]:
        """Merge tensors; small ones by compiled loops side by side, a few before they are asked for."""
        begun: deque[_Begun] = deque()
        ahead, most = 0, AHEAD_BYTES
        if not self._cache.limit or self._device.type != "cpu" or workers.count() == 1:
            most = 0  # without a cache nothing is held but what is merged
        try:
            for op in ops:
                base = self._base(op.tensor)
                size = base.nbytes * (1 + len(op.setting.models))
                merging = self._begin(op, base, size * workers.count() <= most)
                begun.append(_Begun(op.tensor, size, merging))
                del base, merging  # what is given is not held while the next is read
                ahead += size
                while ahead > most:
                    ahead -= begun[0].size
                    yield begun[0].tensor, begun.popleft().merging.result()
            while begun:
                yield begun[0].tensor, begun.popleft().merging.result()
        finally:
            for each in begun:
                each.merging.cancel()

    def _check_statistics(self, op: TensorOp) -> None:
        kind = METHODS[op.setting.method].spec.needs
        for model in op.setting.models if kind is not None else ():
            found = self._sources.statistics.get(model)
            if found is None or kind not in found.kinds:
                raise RecipeError(f"{op.cell}: {lacking(op.setting.method, str(kind), model)}")

    def _merge(self, op: TensorOp) -> torch.Tensor:
        return self._begin(op, self._base(op.tensor), small=False).result()

    def _begin(self, op: TensorOp, base: torch.Tensor, small: bool) -> Future[torch.Tensor]:
        """Read the task vectors of a tensor and merge it; a worker does the small ones."""
        if not base.is_floating_point() or not op.setting.models or not base.numel():
            return _ended(base)
        method = METHODS[op.setting.method]
        read = self._reader(method, base, len(op.setting.models))
        deltas = [
            None if model == self._sources.base_name else read(model, op.tensor, base.reshape(-1))
            for model in op.setting.models
        ]
        self._kept.update(
            (m, op.tensor) for m, delta in zip(op.setting.models, deltas, strict=True) if delta is None
        )
        if all(delta is None for delta in deltas) and method.keeps_base(op.setting):
            return _ended(base)
        # torch's many short calls would have the workers wait for each other
        in_worker = small and method.compiled and self._compiled and base.dtype in DTYPES
        inputs = TensorInputs(
            base=base.reshape(-1),
            deltas=deltas,
            setting=op.setting,
            dtype=torch.float32,
            shape=tuple(base.shape),
            seeds=op.seeds,
            where=f"{op.cell}, tensor `{op.tensor}`",
            name=op.tensor,
            chunk=CHUNK if in_worker else self._chunk,
            once=_Once(self._cache, op.tensor),
            statistics=_Statistics(self, op),
        )
        if in_worker:
            return workers.pool(workers.count()).submit(_merged, op, inputs)
        return _ended(_merged(op, inputs))

    def _base(self, tensor: str) -> torch.Tensor:
        if self._on_device is not None:
            base = self._on_device.sources.base(tensor)
            self._on_device.sources.arrive()
            return base
        read = self._sources.base_tensor
        return self._cache.get((tensor, "base"), lambda: read(tensor).to(self._device))

    def _reader(self, method: Method, base: torch.Tensor, models: int) -> Read:
        """How the task vectors of one tensor are read."""
        if self._on_device is not None:
            return self._there
        on_cpu = self._device.type == "cpu"
        if on_cpu and method.streams and not self._cache.limit and base.numel() * 4 * models > WHOLE_BYTES:
            return self._sources.streamed_delta
        return self._raw if method.compiled and self._compiled and base.dtype in DTYPES else self._delta

    def _there(self, model: str, tensor: str, base: torch.Tensor) -> TaskVector | None:
        """A task vector in float32, where the sources are on the device for its kernels."""
        assert self._on_device is not None
        delta = self._on_device.sources.delta(model, tensor, base)
        self._on_device.sources.arrive()
        return None if delta is None else delta[:]

    def _delta(self, model: str, tensor: str, base: torch.Tensor) -> TaskVector | None:
        """A task vector in float32."""

        def read() -> torch.Tensor | None:
            delta = self._sources.delta(model, tensor)
            return None if delta is None else delta.to(self._device, torch.float32).reshape(-1)

        return self._cache.get((tensor, "delta", model), read)

    def _raw(self, model: str, tensor: str, base: torch.Tensor) -> TaskVector | None:
        """A task vector in the form that the compiled loops read."""
        held = self._cache.get((tensor, "held", model), lambda: self._sources.held(model, tensor, base))
        return None if held is None else from_held(held, base)

    def statistics(self, model: str, tensor: str, kind: str) -> torch.Tensor | None:
        """Statistics of one tensor in float32 on the merger's device; of a kind that the model carries."""

        def read() -> torch.Tensor | None:
            found = self._sources.statistics[model].read(kind, tensor)
            return None if found is None else found.to(self._device, torch.float32)

        return self._cache.get((tensor, kind, model), read)

    def statistics_rms(self, model: str, kind: str) -> float:
        """Their root mean square over all tensors of the model."""
        return self._sources.statistics[model].rms(kind)


class _Begun(NamedTuple):
    """A tensor that is being merged, or waits for that."""

    tensor: str
    size: int  # bytes, with those of its sources
    merging: Future[torch.Tensor]


def _merged(op: TensorOp, inputs: TensorInputs) -> torch.Tensor:
    """The merged tensor.

    Raises:
        RecipeError: it is not finite.
    """
    kernel = METHODS[op.setting.method].kernel(inputs)
    merged = torch.empty_like(inputs.base)
    if fits(kernel, inputs.base):
        finite = merge(kernel, inputs.base, merged)
    else:
        work = inputs.scratch(1)[0]
        check = torch.zeros((), device=merged.device)
        for low in range(0, merged.numel(), inputs.chunk):
            high = min(low + inputs.chunk, merged.numel())
            part = work[: high - low].copy_(inputs.base[low:high])
            kernel(low, high, part)
            check += merged[low:high].copy_(part).sum()
        # one test per tensor; a finite tensor whose sum overflows is looked at again
        finite = bool(check.isfinite()) or bool(merged.isfinite().all())
    if not finite:
        raise _not_finite(op, merged.dtype)
    return merged.reshape(inputs.shape)


def _ended(tensor: torch.Tensor) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = Future()
    future.set_result(tensor)
    return future


def _not_finite(op: TensorOp, dtype: torch.dtype) -> RecipeError:
    return RecipeError(
        f"{op.cell}, tensor `{op.tensor}`: {op.setting.method} gives values that are not finite in {dtype}; "
        "its weights are too large for this tensor, or a source holds such values"
    )


class _Entry(NamedTuple):
    value: object
    size: int
    used_in: int  # number of the pass that used it last


class _Cache:
    """Values by key within a limit of bytes; the least recently used go first.

    A candidate is one pass over all tensors. Were an entry of the pass before pushed out by this pass, a
    cache a little too small would never hit; so only entries that a whole pass has not used make room, and
    what finds no room is not kept. Threads may ask at the same time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._pass = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = Lock()

    def begin_pass(self) -> None:
        self._pass += 1

    def clear(self) -> None:
        with self._lock:
            self.used = 0
            self._entries.clear()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries[key] = entry._replace(used_in=self._pass)
                self._entries.move_to_end(key)
                return entry.value  # type: ignore[return-value]
        value = compute()
        size = int(getattr(value, "nbytes", 64))
        with self._lock:
            self._make_room(size)
            if key not in self._entries and self.used + size <= self.limit:
                self._entries[key] = _Entry(value, size, self._pass)
                self.used += size
        return value

    def _make_room(self, size: int) -> None:
        while self._entries and self.used + size > self.limit:
            oldest = next(iter(self._entries))
            if self._entries[oldest].used_in >= self._pass - 1:
                return
            self.used -= self._entries.pop(oldest).size


class _Once(NamedTuple):
    """The cache as methods see it: their keys belong to one tensor."""

    cache: _Cache
    tensor: str

    def __call__(self, key: Hashable, compute: Callable[[], T]) -> T:
        return self.cache.get((self.tensor, "once", key), compute)


class _Statistics(NamedTuple):
    """Statistics as methods see them: of one operation's tensor, by the places of its models."""

    merger: Merger
    op: TensorOp

    def __call__(self, index: int, kind: str) -> torch.Tensor | None:
        return self.merger.statistics(tuple(self.op.setting.models)[index], self.op.tensor, kind)

    def rms(self, index: int, kind: str) -> float:
        return self.merger.statistics_rms(tuple(self.op.setting.models)[index], kind)
