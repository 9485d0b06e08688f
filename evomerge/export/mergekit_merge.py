"""Merge what a mergekit file asks for, without mergekit.

Everything is computed in float32 and cast once, whatever `dtype` says: with `dtype: float32` the weights
are mergekit's; with `dtype: bfloat16` they are more exact than its own. Random masks are evomerge's, or on
request those that mergekit draws itself (`merge.replay`).

Named documents, and adapters of other models than the base, become temporary model folders beside the output.

Imports: torch, `merge`, `sources`, `export`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ExportError, RecipeError
from evomerge.export.layer_config import layered_config
from evomerge.export.mergekit_document import Document
from evomerge.export.mergekit_layers import Output, layer_sources, sliced_outputs, whole_outputs
from evomerge.export.mergekit_reader import read_mergekit
from evomerge.export.mergekit_values import ModelRef, Row
from evomerge.merge.cast import Float32Sources, cast
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan, TensorOp
from evomerge.merge.replay import Replay
from evomerge.merge.shards import Entry
from evomerge.merge.writer import MAX_SHARD_BYTES, Say, planned, planned_entry, silent, write_model
from evomerge.recipe import Recipe, Setting
from evomerge.sources.checkpoint import TORCH_DTYPES
from evomerge.sources.layout import Layout
from evomerge.sources.reference import SourceRef
from evomerge.sources.renamed import RenamedSources
from evomerge.sources.source_set import SourceSet
from evomerge.sources.tokenizer import vocabulary
from evomerge.sources.tying import embedding_of


def merge_mergekit(
    path: Path,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    seed: int = 0,
    dtype: str | None = None,
    mergekit_rng: int | None = None,
    say: Say = silent,
) -> Path:
    """Merge the mergekit file `path` into the model folder `out`; returns `out`.

    Relative paths of models count from the working directory, as in mergekit; one that exists only beside
    the file is found there.

    Args:
        path: one document, or several of which all but one have a `name`.
        out: does not exist, or is empty.
        max_shard_bytes: most bytes of tensors in one file.
        seed: of random masks, in [0, 2**32).
        dtype: torch name of the dtype to write, in place of the file's.
        mergekit_rng: draw the masks that mergekit draws with this `--random-seed`, in [0, 2**32), instead
            of evomerge's; `merge.replay` says when that gives mergekit's bits.
        say: told of every shard of the last document.

    Raises:
        ConfigError, RecipeError: what is wrong or not supported in the file, and where.
        SourceError: a model cannot be read, or does not fit the others.
        ExportError: `out` is in use, or the disk is too small.
    """
    *stages, last = read_mergekit(path)
    if mergekit_rng is not None:
        _check_replay(path, [*stages, last])
    if dtype is not None:
        last = replace(last, dtype=dtype)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"`{out}` exists and is not an empty folder; remove it or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.stages")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a merge that was killed
    scratch.mkdir()
    card = (
        f"---\nlibrary_name: transformers\ntags:\n- merge\n- evomerge\n---\n\n# {out.name}\n\nA merge made "
    )
    card += f"with evomerge from a mergekit file.\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"
    try:
        run = MergekitRun(path.parent, scratch, {}, seed, mergekit_rng)
        for document in stages:
            run.stage(document)
        return run.write(last, out, card, max_shard_bytes, say)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class MergekitRun:
    """One file being merged.

    Attributes:
        home: folder of the file.
        scratch: where stages are written.
        done: name of a document, or reference of a model with an adapter -> its stage.
        seed: of random masks.
        mergekit_rng: seed of mergekit's masks, None for evomerge's.
    """

    home: Path
    scratch: Path
    done: dict[str, Path]
    seed: int
    mergekit_rng: int | None = None

    def stage(self, document: Document) -> Path:
        """Merge a document that others use, once."""
        name = str(document.name)
        if name not in self.done:
            # the place is taken first: merging it may need a stage for a model with an adapter
            self.done[name] = self.scratch / f"{len(self.done):02d}"
            self.write(document, self.done[name])
        return self.done[name]

    def write(
        self,
        document: Document,
        folder: Path,
        card: str | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        say: Say = silent,
    ) -> Path:
        """Merge a document into `folder`."""
        sources, names = self.open(document)
        _check_tokens(document, sources)
        models: SourceSet | RenamedSources = sources
        donor = sources.folders[sources.base_name]
        key = [sources.stamp(), f"mergekit rng {self.mergekit_rng}"]
        if document.slices:
            outputs = sliced_outputs(document, sources, names)
            layers = layer_sources(document, names)
            config = layered_config(sources, layers, document.where)
            models = RenamedSources(sources, {output.name: output.origin(names) for output in outputs})
            donor = _donor(donor, config, self.scratch)
            key.append(json.dumps(layers))
            entries = [planned_entry(o.name, models.info(o.name), document.dtype) for o in outputs]
        else:
            outputs = whole_outputs(document, sources)
            entries = planned(sources.base, document.dtype)
        ops = operations(outputs, names, self.seed, sources.base_name)
        replay = None
        if self.mergekit_rng is not None and document.spec.random:
            replay = Replay(self.mergekit_rng, ops, sources)
        return write_model(
            folder,
            entries,
            partial(_tensors, document, ops, models, entries, replay),
            donor,
            key=" ".join((*(op.digest for op in ops), *key)),
            max_shard_bytes=max_shard_bytes,
            card=card,
            dtype=document.dtype,
            say=say,
        )

    def open(self, document: Document) -> tuple[SourceSet, dict[ModelRef, str]]:
        """The document's models as sources, and their names.

        The base of the sources is `base_model`, or the first model, without its adapter.
        """
        root = document.refs[0]
        # An adapted base that task vectors count from must be whole; one that is an input need not be.
        inputs = document.refs if document.slices else [ref for ref, _ in document.models]
        base = root if root.lora is not None and root not in inputs else root.plain
        names, sources = {base: str(base)}, {}
        for number, ref in enumerate(inputs):
            if ref == base:
                continue
            # a mask is a function of its model's name; files have no names for models, but places
            names[ref] = f"models[{number}]" if document.spec.random else str(ref)
            if ref.lora and ref.plain == base:
                sources[names[ref]] = SourceRef(adapter=self._place(ref.lora), revision=ref.lora_revision)
            else:
                sources[names[ref]] = self._model(ref)
        same = not document.slices
        return SourceSet.open(self._model(base), sources, names[base], same_layers=same), names

    def _model(self, ref: ModelRef) -> SourceRef:
        """A full model; an adapter is merged into its model first."""
        if ref.path in self.done and ref.lora is None:
            return SourceRef(model=str(self.done[ref.path]))
        if ref.lora is None:
            return SourceRef(model=self._place(ref.path), revision=ref.revision)
        whole = {"weight": (Row(None, (1.0,)),)}
        document = Document(
            f"model `{ref}`",
            str(ref),
            SPECS["task_arithmetic"],
            ref.plain,
            ((ref, whole),),
            {},
            dtype="float32",
        )
        return SourceRef(model=str(self.stage(document)))

    def _place(self, text: str) -> str:
        beside = self.home / text
        return str(beside.resolve()) if not Path(text).exists() and beside.exists() else text


def _tensors(
    document: Document,
    ops: Sequence[TensorOp],
    sources: SourceSet | RenamedSources,
    entries: Sequence[Entry],
    replay: Replay | None,
    names: Set[str],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in `names`, merged, in the dtypes of `entries`."""
    merger = Merger(Float32Sources(sources))
    for op, entry in zip(ops, entries, strict=True):
        if op.tensor not in names:
            continue
        copied = _copied(op)
        if replay is not None:
            tensor = replay.merge(op)
        elif copied is None:
            ((_, tensor),) = merger.materialize(MergePlan(sources.base_name, (op,)))
        else:
            tensor = sources.whole(copied, op.tensor)
        yield op.tensor, cast(tensor, TORCH_DTYPES[entry.dtype], f"{document.where}, tensor `{op.tensor}`")


def operations(
    outputs: Sequence[Output], names: Mapping[ModelRef, str], seed: int, base: str
) -> list[TensorOp]:
    """One operation per tensor, all checked before the first is carried out.

    Args:
        outputs: the tensors.
        names: of the models, in the sources.
        seed: of random masks.
        base: the sources' base, from which tensors of whole models count; those of a slice have their own.

    Raises:
        RecipeError: a value is missing or out of its range.
    """
    layout = Layout(output.name for output in outputs)
    root = Recipe("", (), {}, seed)
    ops = []
    for output in outputs:
        document, tensor = output.document, output.name
        setting = document.setting(tensor, output.t, names, output.tensors)
        start = names[document.refs[0]] if output.in_slice else base
        if setting.method == "slerp" and next(iter(setting.models)) == start:
            models = {name: values for name, values in setting.models.items() if name != start}
            setting = Setting(setting.method, setting.parameters, models)
        seeds = (
            tuple(root.seed_for(model, tensor) for model in setting.models) if document.spec.random else ()
        )
        ops.append(TensorOp(tensor, layout.cell(tensor), setting, seeds))
    return ops


def _copied(op: TensorOp) -> str | None:
    """The model that `op` copies: an average in which it alone has a weight, and that is 1."""
    weights = {name: values.get("weight", 0.0) for name, values in op.setting.models.items()}
    named = [name for name, weight in weights.items() if weight]
    return named[0] if op.setting.method == "linear" and [weights[n] for n in named] == [1.0] else None


def _donor(folder: Path, config: Mapping[str, Any], scratch: Path) -> Path:
    """A new folder in `scratch` like `folder`, without its tensors and with another config.json."""
    into = Path(tempfile.mkdtemp(prefix="donor-", dir=scratch))
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
            (into / file.name).symlink_to(file.resolve())
    (into / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return into


def _check_replay(path: Path, documents: Sequence[Document]) -> None:
    """mergekit's masks can be drawn again where it draws some, in float32, and merges no adapter."""
    random = [document for document in documents if document.spec.random]
    if not random:
        raise RecipeError(f"{path}: no document draws random masks; leave `--mergekit-rng` out")
    for document in random:
        if document.slices:
            raise RecipeError(
                f"{document.where}: it has `slices`, and mergekit's masks can be drawn again for `models` "
                "only; leave `--mergekit-rng` out"
            )
        if document.computed_in != "float32":
            raise RecipeError(
                f"{document.where}: `dtype` is {document.computed_in or 'not given'}, but mergekit's masks "
                "can be drawn again for float32 only; write `dtype: float32`, and an `out_dtype` if you wish"
            )
        adapted = [ref for ref in document.refs if ref.lora]
        if adapted:
            raise RecipeError(
                f"{document.where}: `{adapted[0]}` has an adapter, and merging it, unless it lies in a "
                "cache, moves mergekit's generator on; merge the adapter into a model of its own first"
            )


def _check_tokens(document: Document, sources: SourceSet) -> None:
    """Asked for the base's tokenizer, mergekit cuts rows off the embedding that no token uses."""
    name = embedding_of(sources.tensor_names)
    if not document.base_tokens or name is None:
        return
    rows = sources.base.tensors[name].shape[0]
    tokens = vocabulary(sources.base.folder)
    if tokens is None or 1 + max(tokens.values()) != rows:
        raise RecipeError(
            f"{document.where}: the base's embedding has {rows} rows and its tokenizer another number of "
            "tokens (or none that can be read), so mergekit would resize the embedding, which is not "
            "supported yet; remove the tokenizer key"
        )
