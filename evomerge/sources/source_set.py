"""All sources of a run, opened and checked: the base's tensors and every model's task vectors.

A task vector (delta) is `model - base` in float32. Full checkpoints are read, and adapters multiplied out,
tensor by tensor, so that no merged copy of an adapter is ever written.

Imports: `evomerge.errors` and `evomerge.sources`; torch only when a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from evomerge.errors import SourceError
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint
from evomerge.sources.compatibility import check
from evomerge.sources.layout import Layout
from evomerge.sources.reference import SourceRef, commit_of, resolve
from evomerge.sources.statistics import ModelStatistics
from evomerge.sources.streamed import TaskVector, streamed
from evomerge.sources.tying import mergeable

if TYPE_CHECKING:
    import torch


class SourceSet:
    """The base and the models that fit it; made by `SourceSet.open`.

    Attributes:
        base_name: name of the base in recipes and reports.
        models: names of the models, in the order given.
        tensor_names: every tensor that a merge writes, in the base checkpoint's order. A tied embedding
            is listed once.
        base: the base checkpoint.
        sources: model name -> its checkpoint or adapter.
        refs: what the user wrote, by name, base included.
        folders: local folder by name, base included.
        statistics: what models carry beside their weights, for the models that do.
    """

    def __init__(
        self,
        base_name: str,
        base: Checkpoint,
        sources: Mapping[str, Checkpoint | Adapter],
        refs: Mapping[str, SourceRef],
    ) -> None:
        self.base_name = base_name
        self.base = base
        self.sources = dict(sources)
        self.refs = dict(refs)
        self.models = tuple(self.sources)
        self.folders = {base_name: base.folder, **{name: s.folder for name, s in self.sources.items()}}
        self.tensor_names = mergeable(base)
        self.statistics: dict[str, ModelStatistics] = {}

    @classmethod
    def open(
        cls,
        base: SourceRef,
        models: Mapping[str, SourceRef],
        base_name: str = "base",
        *,
        checked: bool = True,
        same_layers: bool = True,
    ) -> SourceSet:
        """Resolve, open and check every source; reads headers and JSON files, no weights.

        Args:
            base: a full model.
            models: name -> full model or adapter.
            base_name: name of the base; no model may have it.
            checked: refuse sources that do not fit the base. Without the check, `delta` is only for tensors
                that model and base have in one shape, and statistics are not opened.
            same_layers: whether full models must have the base's tensors, and not only its kind and
                vocabulary. If not, `delta` is only for tensors as above.

        Raises:
            SourceError: a source is missing or cannot be read, or the base is an adapter.
            CompatibilityError: a source does not fit the base, or statistics do not fit their model (only
                when `checked`).
        """
        if base.adapter is not None:
            raise SourceError(f"base `{base_name}`: `{base.adapter}` is an adapter; give a full model")
        if base.statistics:
            raise SourceError(
                f"base `{base_name}` has `statistics`, but only those of models are used; remove them"
            )
        if base_name in models:
            raise SourceError(f"model `{base_name}` has the name of the base; rename one of the two")
        opened = _open(base, f"base `{base_name}`")
        assert isinstance(opened, Checkpoint)  # as base.adapter is None
        sources = {name: _open(ref, f"model `{name}`") for name, ref in models.items()}
        result = cls(base_name, opened, sources, {base_name: base, **models})
        if checked:
            check(result, same_layers=same_layers)
            for name, ref in models.items():
                if ref.statistics:
                    result.statistics[name] = _statistics(ref, sources[name], opened, f"model `{name}`")
        return result

    def layout(self, modules: Mapping[str, Iterable[str]] | None = None) -> Layout:
        """The cells of the base; `modules` are extra patterns, as in `Layout`."""
        return Layout(self.tensor_names, modules)

    def base_tensor(self, name: str) -> torch.Tensor:
        """The base's tensor on the CPU in its stored dtype."""
        return self.base.read(name)

    def checkpoint(self, model: str) -> Checkpoint:
        """A full model's checkpoint, or the base; the base also for an adapter."""
        source = self.sources.get(model)
        return source if isinstance(source, Checkpoint) else self.base

    def whole(self, model: str, name: str) -> torch.Tensor:
        """A model's own tensor on the CPU: as stored, or float32 where an adapter changes it."""
        tensor = self.checkpoint(model).read(name)
        delta = self.delta(model, name, tensor) if isinstance(self.sources.get(model), Adapter) else None
        return tensor if delta is None else tensor.float() + delta

    def may_change(self, model: str, name: str) -> bool:
        """Whether `delta` can be other than None, judged without reading weights."""
        if not self.base.tensors[name].floating:
            return False
        source = self.sources[model]
        return not isinstance(source, Adapter) or name in source.pairs or name in source.full

    def delta(self, model: str, name: str, base: torch.Tensor | None = None) -> torch.Tensor | None:
        """Task vector of one tensor: float32 on the CPU, shaped like the base's tensor.

        `base` is the base's tensor when the caller has read it already.

        None when the model leaves the tensor as it is: an adapter without it, or a checkpoint whose tensor
        equals the base's. Tensors that are not floating point are never changed.
        """
        if not self.may_change(model, name):
            return None
        source = self.sources[model]

        def start() -> torch.Tensor:
            return self.base.read(name) if base is None else base

        if not isinstance(source, Adapter):
            return task_vector(source.read(name), start())
        replacement, product = source.replacement(name), source.delta(name)
        moved = None if replacement is None else task_vector(replacement, start())
        if moved is None or product is None:
            return product if moved is None else moved
        return moved + product

    def held(self, model: str, name: str, base: torch.Tensor) -> torch.Tensor | None:
        """As `delta`, but flat; the model's own entries where model and `base` are both bfloat16 or float16.

        They are half as large; `streamed.from_held` makes a task vector of either.

        Args:
            base: as for `streamed_delta`.
        """
        source = self.sources[model]
        if isinstance(source, Adapter) or not self.may_change(model, name):
            delta = self.delta(model, name)
            return None if delta is None else delta.reshape(-1)
        return own_or_delta(source.read(name).reshape(-1), base)

    def streamed_delta(self, model: str, name: str, base: torch.Tensor) -> TaskVector | None:
        """As `delta`, but flat, and read from the model's file slice by slice where that is possible.

        It is not for an adapter's product, which is made whole.

        Args:
            base: `base_tensor(name)`, flat, in its own dtype or float32.
        """
        source = self.sources[model]
        if isinstance(source, Adapter) or not self.may_change(model, name):
            delta = self.delta(model, name)
            return None if delta is None else delta.reshape(-1)
        return streamed(source, name, base)

    def stamp(self) -> str:
        """Names, sizes and times of all tensor files: whether one was replaced, without reading it."""
        all_files = (self.base, *self.sources.values(), *self.statistics.values())
        files = [file for source in all_files for file in source.files]
        return " ".join(f"{file}:{(stat := file.stat()).st_size}:{stat.st_mtime_ns}" for file in files)

    def hashes(self) -> dict[str, str]:
        """SHA-256 by name, base first; reads every file once and remembers the result.

        The statistics of a model have an entry of their own, `NAME statistics`.
        """
        return {
            self.base_name: self.base.sha256(),
            **{name: source.sha256() for name, source in self.sources.items()},
            **{statistics_key(name): found.sha256() for name, found in self.statistics.items()},
        }

    def describe(self) -> list[dict[str, Any]]:
        """One JSON-ready row per source, base first.

        Keys: name, kind ("base", "model" or "adapter"), source (the folder or hub id as given), revision
        (the commit of a hub id, else None), sha256, parameters, bytes (of the tensors), statistics (kinds).
        """
        hashes = self.hashes()
        models = [(self.refs[name].key, name, source) for name, source in self.sources.items()]
        return [
            {
                "name": name,
                "kind": kind,
                "source": self.refs[name].text,
                "revision": commit_of(source.folder),
                "sha256": hashes[name],
                "parameters": source.parameters,
                "bytes": source.bytes,
                "statistics": list(self.statistics[name].kinds) if name in self.statistics else [],
            }
            for kind, name, source in [("base", self.base_name, self.base), *models]
        ]


def statistics_key(model: str) -> str:
    """Name under which the hash of a model's statistics stands beside those of the sources."""
    return f"{model} statistics"


def _statistics(
    ref: SourceRef, source: Checkpoint | Adapter, base: Checkpoint, where: str
) -> ModelStatistics:
    found = ModelStatistics(ref.statistics, where)
    found.check_shapes(base.tensors)
    # which model they were measured on; an adapter is a model together with its base
    found.check_hash("model_sha256", source.sha256)
    if isinstance(source, Adapter):
        found.check_hash("base_sha256", base.sha256)
    return found


def _open(ref: SourceRef, where: str) -> Checkpoint | Adapter:
    folder = resolve(ref, where)
    try:
        return Checkpoint(folder) if ref.adapter is None else Adapter(folder)
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from error


def own_or_delta(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor | None:
    """`tensor` where both are of one 16-bit dtype, else the float32 task vector; None when they are equal."""
    import torch

    if tensor.dtype == base.dtype and tensor.dtype.itemsize == 2:
        return None if torch.equal(tensor, base) else tensor
    return task_vector(tensor, base)


def task_vector(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor | None:
    """float32(tensor) - float32(base); None when they are equal."""
    import torch

    if tensor.dtype == base.dtype and torch.equal(tensor, base):
        return None
    delta = tensor.float() - base.float()
    return delta if bool(delta.any()) else None
