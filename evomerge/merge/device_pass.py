"""The common methods on an accelerator: one pass over memory, one launch for the tensors of a window.

A window is a run of tensors whose results take `WINDOW` bytes. While it is merged, the sources of the next
are sent and its tables are written; nothing waits for the device except, once per window, for the flags that
tell which results are not finite. Thresholds are looked up in what `MagnitudeIndex` remembers; those that are
not there stay on the device, as do the places of cuts and the norms.

Results are those of the CPU, bit by bit. Random masks are computed inside the kernel and are those of
`evomerge.merge.mask`. Other methods, dtypes other than bfloat16, float16 and float32, and machines without
Triton are left to torch.

Has not run on a GPU yet: checked in Triton's interpreter (`TRITON_INTERPRET=1`, then on a CPU too).

Imports: torch, `evomerge.merge`; triton when there is something to merge.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from evomerge.merge.device_sources import Cache, DeviceSources
from evomerge.merge.device_tables import DTYPES, FAMILY, Formula, Job, Tables
from evomerge.merge.plan import TensorOp
from evomerge.merge.workers import BLOCK

WINDOW = 512 << 20  # bytes of results; two windows and what of their sources is not kept are held at once
MAPS = 4096  # maps from programs to tensors that are remembered
STEP = 1024  # counts or sums of blocks looked at together
EXACT = {"enable_fp_fusion": False}  # no product is contracted with a sum

Merge = Callable[[TensorOp], torch.Tensor]
Failure = Callable[[TensorOp, torch.dtype], Exception]


def usable(device: torch.device) -> bool:
    """Whether the kernels run there: on CUDA and ROCm with Triton, on a CPU in Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    there = device.type == "cuda" or (device.type == "cpu" and interpreted)
    return there and importlib.util.find_spec("triton") is not None


class Map(NamedTuple):
    """Which program merges what.

    Attributes:
        tensor_of: `(programs,)` int32, number of the tensor.
        first_of: `(tensors + 1,)` int32, number of a tensor's first program.
    """

    tensor_of: torch.Tensor
    first_of: torch.Tensor


class Window(NamedTuple):
    """Tensors merged together.

    Attributes:
        ops: in the plan's order.
        jobs: by place in `ops`: what a kernel merges; the rest is left to torch.
        launches: `(tables, flags)` of one launch, the flags in host memory when `done`.
        done: recorded after the last launch.
    """

    ops: list[TensorOp]
    jobs: dict[int, Job]
    launches: list[tuple[Tables, torch.Tensor]]
    done: Any


class DevicePass:
    """Carries the operations of a plan out.

    Args:
        sources: on the device.
        device: CUDA, or a CPU in the interpreter.
        cache: what methods derive from the sources alone.
        by_torch: merges one tensor that the kernels cannot.
        failure: the error for a tensor with results that are not finite.

    Attributes:
        sources: as given.
    """

    def __init__(
        self, sources: DeviceSources, device: torch.device, cache: Cache, by_torch: Merge, failure: Failure
    ) -> None:
        self.sources, self._device, self._cache = sources, device, cache
        self._by_torch, self._failure = by_torch, failure
        self._maps: dict[tuple[int, ...], Map] = {}

    def run(self, ops: Iterable[TensorOp]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, merged tensor)` in order; see `Merger.materialize`."""
        before: Window | None = None
        for window in self._windows(ops):
            if before is not None:
                yield from self._results(before)
            before = window
        if before is not None:
            yield from self._results(before)

    def _windows(self, ops: Iterable[TensorOp]) -> Iterator[Window]:
        """Windows whose launches are under way; what comes next is launched when the caller asks."""
        waiting: list[TensorOp] = []
        jobs: dict[int, Job] = {}
        size = 0
        for op in ops:
            job = self._job(op)
            if job is not None:
                jobs[len(waiting)] = job
                size += job.base.nbytes
            waiting.append(op)
            if size >= WINDOW:
                yield self._launched(waiting, jobs)
                waiting, jobs, size = [], {}, 0
        if waiting:
            yield self._launched(waiting, jobs)

    def _job(self, op: TensorOp) -> Job | None:
        """What the kernels merge of one operation; None where torch has to."""
        if op.setting.method not in FAMILY or not op.setting.models:
            return None
        base = self.sources.base(op.tensor)
        if base.dtype not in DTYPES or not base.numel():
            return None
        read, flat = self.sources.delta, base.reshape(-1)
        return Job.of(op, base, [read(model, op.tensor, flat) for model in op.setting.models])

    def _launched(self, ops: list[TensorOp], jobs: dict[int, Job]) -> Window:
        self.sources.arrive()
        alike: dict[Formula, list[Job]] = {}
        for job in jobs.values():
            alike.setdefault(job.formula, []).append(job)
        launches = []
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            for group in alike.values():
                tables = Tables(group, self._device, self._cache)
                launches.append((tables, self._launch(tables)))
            done = None
            if self._device.type == "cuda":
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
        return Window(ops, jobs, launches, done)

    def _launch(self, tables: Tables) -> torch.Tensor:
        """Start the kernels of some tables; their flags, not there yet."""
        from evomerge.merge import _triton

        how = tables.formula
        shape = {"TERMS": len(how.kinds), "KINDS": how.kinds, "RAWS": how.raws, **EXACT}
        shape["DTYPE"] = _triton.DTYPES[how.dtype]
        if tables.tied:
            self._find_places(tables, shape)
        if tables.weights is not None:
            self._rescale(tables, *tables.weights, shape)
        work = self._map(tables, how.block)
        flags = torch.zeros(len(tables.jobs), dtype=torch.int32, device=self._device)
        _triton.merge[(len(work.tensor_of),)](
            *work, tables.words, tables.numbers, flags, MODE=how.mode, BLOCK=how.block, **shape
        )
        if self._device.type == "cpu":
            return flags
        return torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True).copy_(flags, non_blocking=True)

    def _find_places(self, tables: Tables, shape: Mapping[str, Any]) -> None:
        from evomerge.merge import _triton

        work, counts = self._by_block(tables, torch.int32)
        _triton.ties[counts.shape[:1]](*work, tables.words, counts, BLOCK=BLOCK, **shape)
        cuts = (len(tables.jobs), 2)
        _triton.places[cuts](work.first_of, tables.words, counts, STEP=STEP, BLOCK=BLOCK, **shape)

    def _rescale(
        self, tables: Tables, weights: torch.Tensor, smallest: torch.Tensor, shape: Mapping[str, Any]
    ) -> None:
        from evomerge.merge import _triton

        work, sums = self._by_block(tables, torch.float64)
        halvings, count = BLOCK.bit_length() - 1, sums.shape[1]
        _triton.norms[sums.shape[:1]](*work, tables.words, sums, BLOCK=BLOCK, HALVINGS=halvings, **shape)
        _triton.rescale[(len(tables.jobs), count)](
            work.first_of, sums, weights, tables.numbers, smallest, TERMS=count, STEP=STEP, **EXACT
        )

    def _by_block(self, tables: Tables, dtype: torch.dtype) -> tuple[Map, torch.Tensor]:
        """The map for programs of `BLOCK` entries, and room for two numbers of each of their terms."""
        work = self._map(tables, BLOCK)
        count = len(tables.formula.kinds)
        return work, torch.empty((len(work.tensor_of), count, 2), dtype=dtype, device=self._device)

    def _map(self, tables: Tables, block: int) -> Map:
        """Made once for tensors of these sizes."""
        sizes = (block, *(job.base.numel() for job in tables.jobs))
        if sizes not in self._maps:
            if len(self._maps) >= MAPS:
                self._maps.clear()
            programs = torch.tensor([-(-n // block) for n in sizes[1:]])
            tensor_of = torch.repeat_interleave(torch.arange(len(programs)), programs)
            first_of = torch.nn.functional.pad(programs.cumsum(0), (1, 0))
            self._maps[sizes] = Map(*(x.to(self._device, torch.int32) for x in (tensor_of, first_of)))
        return self._maps[sizes]

    def _results(self, window: Window) -> Iterator[tuple[str, torch.Tensor]]:
        if window.done is not None:
            window.done.synchronize()
        bad = {
            job.op.tensor
            for tables, flags in window.launches
            for job, flag in zip(tables.jobs, flags.tolist(), strict=True)
            if flag
        }
        for place, op in enumerate(window.ops):
            job = window.jobs.get(place)
            if op.tensor in bad and job is not None:
                raise self._failure(op, job.base.dtype)
            yield op.tensor, self._by_torch(op) if job is None else job.merged
