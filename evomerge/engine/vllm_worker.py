"""What runs inside each vLLM worker: the merger, and the check that its tensors arrived.

`Extension` is mixed into vLLM's worker class (`worker_extension_cls`). Plain JSON comes in and goes out.
Tensors are streamed into vLLM's own `reload_weights` under their checkpoint names, so that vLLM fuses,
slices and repacks them as it does when it loads a checkpoint.

Imports: torch; `merge`, `sources`. vLLM is never imported: it is what calls.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from evomerge.engine.child import told
from evomerge.errors import EngineError, EvomergeError, RecipeError
from evomerge.merge.fingerprint import bit_sum, checksum, combine, wrapped
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan
from evomerge.recipe import Recipe
from evomerge.sources.layout import Layout
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value


class Extension:
    """Methods that vLLM's workers gain; their prefix keeps them from colliding with vLLM's own."""

    def evomerge_open(self, spec: str) -> str:
        """Open the sources that `spec` (JSON, see `Holder`) names; answers `{}` or an error."""

        def open_sources() -> Mapping[str, Any]:
            self._evomerge_holder = Holder(self, **json.loads(spec))
            return {}

        return _answer(open_sources)

    def evomerge_load(self, order: str) -> str:
        """Merge a recipe into this worker's weights; answers a `Report` or an error.

        The order (JSON) has the arguments of `Holder.load`, the recipe as JSON among them.
        """
        wanted = json.loads(order)
        wanted["recipe"] = Recipe.from_json(wanted["recipe"])
        return _answer(lambda: vars(self._evomerge_holder.load(**wanted)))


def _answer(call: Any) -> str:
    """The result as JSON; our own errors as data, because vLLM would turn them into something else."""
    try:
        return json.dumps(call())
    except EvomergeError as error:
        return json.dumps(told(error))


@dataclass
class Report:
    """What one worker loaded.

    Attributes:
        merge_seconds, swap_seconds, check_seconds: merging, vLLM's loading, comparing.
        tensors: tensors streamed.
        fingerprint: of all merged tensors; equal in all workers.
        merged: `bit_sum` of all merged tensors in the engine's dtype; equal in all workers.
        held: the same of this worker's weights. What several workers hold alike counts in one of them, so
            that the workers' sums add up to `merged`.
    """

    merge_seconds: float = 0.0
    swap_seconds: float = 0.0
    check_seconds: float = 0.0
    tensors: int = 0
    fingerprint: str = ""
    merged: int = 0
    held: int = 0


class Holder:
    """The sources, the merger and the watch over one worker's model.

    Args:
        worker: vLLM's, with `model_runner`, `device` and `reload_weights`.
        base, models: keyword arguments of `SourceRef`; names in recipes are `base_name` and the keys.
        base_name: name of the base in recipes.
        cache_bytes, host_bytes: memory for task vectors, in this worker; see `Merger`.
    """

    def __init__(
        self,
        worker: Any,
        *,
        base: Mapping[str, Any],
        models: Mapping[str, Mapping[str, Any]],
        base_name: str,
        cache_bytes: int,
        host_bytes: int,
    ) -> None:
        self._worker = worker
        self._model: torch.nn.Module = worker.model_runner.get_model()
        self._dtype: torch.dtype = worker.model_config.dtype
        refs = {name: _reference(model) for name, model in models.items()}
        self._sources = SourceSet.open(_reference(base), refs, base_name)
        self._merger = Merger(
            self._sources, device=worker.device, cache_bytes=cache_bytes, host_bytes=host_bytes
        )
        self._layouts: dict[str, Layout] = {}
        self._held: dict[str, Merged] = {}
        parallel = worker.parallel_config
        self._share = Share(parallel.rank % parallel.tensor_parallel_size)
        self._packed = PackedWeights(self._model, self._share)

    def load(self, recipe: Recipe, whole: bool) -> Report:
        """Merge `recipe` into the model.

        Args:
            recipe: what to merge.
            whole: stream every tensor; else those that differ from the candidate before, with all of their
                layer, because vLLM fuses weights and has to be given all parts of one.

        Raises:
            RecipeError: the recipe is wrong; the model holds the base, or a mixture, but is whole.
            EngineError: repacked weights do not answer as the loaded ones.
        """
        layout = self._layout(recipe)
        plan = MergePlan.compile(recipe, layout, SPECS)
        digests = {name: merged.digest for name, merged in self._held.items()}
        changed = [op.tensor for op in self._merger.changed(plan, digests)]
        wanted = set(layout.tensors) if whole else with_neighbours(changed, layout)
        stream = Stream(self._merger, self._sources, plan, self._dtype, wanted)
        for name in wanted:
            self._held.pop(name, None)  # until all is known to have arrived
        start = time.perf_counter()
        if wanted:
            with torch.no_grad(), _no_warnings(not whole):
                self._worker.reload_weights(weights_iterator=iter(stream), is_checkpoint_format=True)
        swapped = time.perf_counter()
        if stream.error is not None:
            raise stream.error
        report = stream.report
        report.swap_seconds = swapped - start - report.merge_seconds - report.check_seconds
        self._packed.finish(self._dtype, whole)
        self._held |= stream.merged
        report.merged = wrapped(sum(merged.sum for merged in self._held.values()))
        report.fingerprint = combine({name: merged.checksum for name, merged in self._held.items()})
        report.held = self._held_sum()
        report.check_seconds += time.perf_counter() - swapped
        return report

    def _layout(self, recipe: Recipe) -> Layout:
        key = json.dumps(recipe.modules, sort_keys=True)
        if key not in self._layouts:
            self._layouts[key] = self._sources.layout(recipe.modules)
        return self._layouts[key]

    def _held_sum(self) -> int:
        """`Report.held`."""
        total, seen = 0, set()
        for prefix, module in self._model.named_modules():
            for name, weight in module.named_parameters(recurse=False):
                if id(weight) in seen:  # tied
                    continue
                seen.add(id(weight))
                if weight.is_meta:
                    raise EngineError(f"vLLM's weight `{prefix}.{name}` has no values after loading")
                if weight.numel():
                    total += bit_sum(self._share(module, weight))
                else:
                    total += self._packed.sums[prefix, name]
        return total


class Merged(NamedTuple):
    """What the model holds of one tensor: `Merger.digest`, `checksum`, `bit_sum` in the engine's dtype."""

    digest: str
    checksum: int
    sum: int


def with_neighbours(names: Iterable[str], layout: Layout) -> set[str]:
    """`names` and all that may share a weight of vLLM with them.

    That is the rest of their layer, and outside of the layers what has the same parent module.
    """

    def key(name: str) -> int | str:
        layer = layout.cell(name).layer
        return name.rpartition(".")[0].rpartition(".")[0] if layer is None else layer

    keys = {key(name) for name in names}
    return {name for name in layout.tensors if key(name) in keys}


class Stream:
    """The merged tensors under their checkpoint names, told to vLLM one after another.

    Attributes:
        merged: what was told, by name; complete after the last.
        report: its seconds and tensors are filled in on the way.
        error: see below.

    vLLM cannot stop in the middle of loading: after a wrong recipe the base's tensors follow, and `error`
    holds what was wrong.
    """

    def __init__(
        self, merger: Merger, sources: SourceSet, plan: MergePlan, dtype: torch.dtype, wanted: Container[str]
    ) -> None:
        self._merger, self._sources, self._plan, self._dtype = merger, sources, plan, dtype
        self._wanted = wanted
        self.merged: dict[str, Merged] = {}
        self.report = Report()
        self.error: RecipeError | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        left = {op.tensor: op for op in self._plan.ops if op.tensor in self._wanted}
        merged = self._merger.materialize(self._plan, only=left.copy())
        while left:
            start = time.perf_counter()
            try:
                name, tensor = next(merged)
            except RecipeError as error:
                self.error = error
                for name in left:
                    yield name, self._sources.base_tensor(name)
                return
            merging = time.perf_counter()
            # widened to float32 a value keeps its bits
            total = bit_sum(tensor if self._dtype == torch.float32 else tensor.to(self._dtype))
            self.merged[name] = Merged(self._merger.digest(left.pop(name)), checksum(tensor), total)
            self.report.merge_seconds += merging - start
            self.report.check_seconds += time.perf_counter() - merging
            yield name, tensor
        self.report.tensors = len(self.merged)


@dataclass(frozen=True)
class Share:
    """What of a weight counts in one worker of a tensor-parallel group, by the marks of vLLM's loaders.

    Attributes:
        rank: of the worker in its group.
    """

    rank: int

    def __call__(self, module: Any, weight: torch.Tensor) -> torch.Tensor:
        """The rows of `weight` that no worker of a lower rank holds too."""
        marked = any(getattr(weight, mark, None) is not None for mark in ("output_dim", "input_dim"))
        if not marked or getattr(module, "tp_size", 2) == 1:
            return weight if self.rank == 0 else weight[:0]
        if self.rank % getattr(module, "num_kv_head_replicas", 1):  # its keys and values are a lower rank's
            return weight[: module.num_heads * module.head_size]
        return weight


class PackedWeights:
    """Weights that vLLM repacks for a kernel while it loads them.

    On a CPU vLLM hands linear layers to oneDNN, which keeps a copy, and drops most plain weights. Such a
    weight is summed before it is packed, and the packed layer is asked for one product, which has to be that
    of the plain weight. An output layer tied to the embedding is not loaded, so vLLM (0.24 to 0.32) leaves
    its packed copy as it was: it is packed again here.

    Args:
        model: vLLM's; whatever its layers do from now on is watched.
        share: what of a weight counts in this worker.

    Attributes:
        sums: `bit_sum` by (module, parameter) of the weights that were dropped.
    """

    def __init__(self, model: torch.nn.Module, share: Share) -> None:
        self._share = share
        self.sums: dict[tuple[str, str], int] = {}
        self._apart: dict[str, float] = {}
        self._names = {
            module: prefix for prefix, module in model.named_modules() if hasattr(module, "cpu_linear")
        }
        self._processed: set[str] = set()
        self._tied: dict[str, int] = {}  # `bit_sum` of what was packed here
        for method in {id(m.quant_method): m.quant_method for m in self._names}.values():
            self._watch(method)

    def _watch(self, method: Any) -> None:
        process = method.process_weights_after_loading

        def watched(layer: torch.nn.Module) -> None:
            weights = dict(layer.named_parameters(recurse=False))
            process(layer)
            self._look(layer, weights)

        method.process_weights_after_loading = watched

    def _look(self, layer: Any, weights: Mapping[str, torch.Tensor]) -> None:
        prefix = self._names[layer]
        self._processed.add(prefix)
        for name, now in layer.named_parameters(recurse=False):
            if not now.numel():
                self.sums[prefix, name] = bit_sum(self._share(layer, weights[name]))
        plain = weights["weight"]
        if plain.ndim == 2:
            # one row of made-up activations, the same for every layer of this width
            row = torch.arange(plain.shape[1], dtype=torch.float32).mul_(0.7).sin_().to(plain.dtype)[None]
            wanted = torch.nn.functional.linear(row, plain).float()
            found = layer.cpu_linear(row, layer.weight, None).float()
            self._apart[prefix] = float((found - wanted).abs().max() / wanted.abs().max().clamp_(min=1e-9))

    def finish(self, dtype: torch.dtype, whole: bool) -> None:
        """After a loading, perhaps of the whole model: pack what was not, and compare.

        Raises:
            EngineError: a layer was not loaded, or does not answer as its plain weight.
        """
        for layer, prefix in self._names.items():
            if prefix in self._processed:
                continue
            if layer.weight.numel():
                now = bit_sum(layer.weight)
                if self._tied.get(prefix) != now:
                    layer.quant_method.process_weights_after_loading(layer)
                    self._tied[prefix] = now
            elif whole:
                raise EngineError(f"vLLM's layer `{prefix}` was not loaded; the trial is not scored")
        self._processed.clear()
        for prefix, apart in self._apart.items():
            if not apart <= PROBE_TOLERANCE[dtype]:
                raise EngineError(
                    f"vLLM's layer `{prefix}` computes with other weights than were loaded (its product is "
                    f"off by {apart:.1e} of the largest value); the trial is not scored"
                )


@contextmanager
def _no_warnings(quiet: bool) -> Iterator[None]:
    """vLLM warns of every layer that a loading leaves as it was."""
    log = logging.getLogger("vllm")
    level = log.level
    if quiet:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _reference(data: Mapping[str, Any]) -> SourceRef:
    return SourceRef(**{**data, "statistics": tuple(data.get("statistics", ()))})
