"""Merge what a mergekit file asks for, without mergekit.

Everything is computed in float32 and cast once, whatever `dtype` says: with `dtype: float32` the weights
are mergekit's; with `dtype: bfloat16` they are more exact than its own. Random masks are evomerge's, or on
request those that mergekit draws itself (`merge.replay`).

Named documents, and adapters of other models than the base, become temporary model folders beside the output.

Imports: torch, `merge`, `sources`, `export.mergekit_reader`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from evomerge.errors import ExportError, RecipeError
from evomerge.export.mergekit_reader import Document, ModelRef, Row, read_mergekit
from evomerge.merge.cast import Float32Sources, cast
from evomerge.merge.merger import Merger
from evomerge.merge.methods import SPECS
from evomerge.merge.plan import MergePlan, TensorOp
from evomerge.merge.replay import Replay
from evomerge.merge.writer import MAX_SHARD_BYTES, Say, planned, silent, write_model
from evomerge.recipe import Recipe
from evomerge.sources.checkpoint import TORCH_DTYPES, Checkpoint
from evomerge.sources.reference import SourceRef
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
        run = _Run(path.parent, scratch, {}, seed, mergekit_rng)
        for document in stages:
            run.stage(document)
        return run.write(last, out, card, max_shard_bytes, say)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class _Run:
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
    mergekit_rng: int | None

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
        sources, names = self._open(document)
        _check_tokens(document, sources)
        ops = _ops(document, sources, names, self.seed)
        replay = None
        if self.mergekit_rng is not None and document.spec.random:
            replay = Replay(self.mergekit_rng, ops, sources)
        return write_model(
            folder,
            planned(sources.base, document.dtype),
            partial(_tensors, document, ops, sources, replay),
            sources.folders[sources.base_name],
            key=" ".join((*(op.digest for op in ops), sources.stamp(), f"mergekit rng {self.mergekit_rng}")),
            max_shard_bytes=max_shard_bytes,
            card=card,
            dtype=document.dtype,
            say=say,
        )

    def _open(self, document: Document) -> tuple[SourceSet, dict[ModelRef, str]]:
        """The document's models as sources, and their names.

        The base of the sources is `base_model`, or the first model, without its adapter.
        """
        root = document.refs[0]
        # An adapted base that task vectors count from must be whole; one that is an input need not be.
        whole = root.lora is not None and root not in [ref for ref, _ in document.models]
        base = root if whole else root.plain
        names, sources = {base: str(base)}, {}
        for ref, _ in document.models:
            if ref == base:
                continue
            names[ref] = str(ref)
            if ref.lora and ref.plain == base:
                sources[names[ref]] = SourceRef(adapter=self._place(ref.lora), revision=ref.lora_revision)
            else:
                sources[names[ref]] = self._model(ref)
        return SourceSet.open(self._model(base), sources, names[base]), names

    def _model(self, ref: ModelRef) -> SourceRef:
        """A full model; an adapter is merged into its model first."""
        if ref.path in self.done and ref.lora is None:
            return SourceRef(model=str(self.done[ref.path]))
        if ref.lora is None:
            return SourceRef(model=self._place(ref.path), revision=ref.revision)
        whole = {"weight": (Row(None, (1.0,)),)}
        document = Document(
            f"model `{ref}`", str(ref), SPECS["task_arithmetic"], ref.plain, ((ref, whole),), {}, "float32"
        )
        return SourceRef(model=str(self.stage(document)))

    def _place(self, text: str) -> str:
        beside = self.home / text
        return str(beside.resolve()) if not Path(text).exists() and beside.exists() else text


def _tensors(
    document: Document, ops: Sequence[TensorOp], sources: SourceSet, replay: Replay | None, names: Set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in `names`, merged, in the dtype that the document asks for."""
    merger = Merger(Float32Sources(sources))
    for op in ops:
        if op.tensor not in names:
            continue
        copied = _copied(op, sources)
        if replay is not None:
            tensor = replay.merge(op)
        elif copied is None:
            ((_, tensor),) = merger.materialize(MergePlan(sources.base_name, (op,)))
        else:
            tensor = copied.read(op.tensor)
        dtype = document.dtype or TORCH_DTYPES[sources.base.tensors[op.tensor].dtype]
        yield op.tensor, cast(tensor, dtype, f"{document.where}, tensor `{op.tensor}`")


def _ops(document: Document, sources: SourceSet, names: Mapping[ModelRef, str], seed: int) -> list[TensorOp]:
    """One operation per tensor, all checked before the first is carried out."""
    layout = sources.layout()
    last = layout.n_layers - 1
    # mergekit files have no names for models: masks depend on their places in the document
    root = Recipe(sources.base_name, sources.models, {}, seed)
    ops = []
    for tensor in layout.tensors:
        cell = layout.cell(tensor)
        t = 0.0 if cell.layer is None else cell.layer / last if last else 1.0
        setting = document.setting(tensor, t, names)
        if setting.method == "slerp" and next(iter(setting.models)) == sources.base_name:
            models = {name: values for name, values in setting.models.items() if name != sources.base_name}
            setting = type(setting)(setting.method, setting.parameters, models)
        places = range(len(setting.models)) if document.spec.random else ()
        seeds = tuple(root.seed_for(f"models[{place}]", tensor) for place in places)
        ops.append(TensorOp(tensor, cell, setting, seeds))
    return ops


def _copied(op: TensorOp, sources: SourceSet) -> Checkpoint | None:
    """The checkpoint that `op` copies: an average in which one model alone has a weight, and that is 1."""
    weights = {name: values.get("weight", 0.0) for name, values in op.setting.models.items()}
    named = [name for name, weight in weights.items() if weight]
    if op.setting.method != "linear" or [weights[name] for name in named] != [1.0]:
        return None
    source = sources.base if named[0] == sources.base_name else sources.sources[named[0]]
    return source if isinstance(source, Checkpoint) else None


def _check_replay(path: Path, documents: Sequence[Document]) -> None:
    """mergekit's masks can be drawn again where it draws some, in float32, and merges no adapter."""
    random = [document for document in documents if document.spec.random]
    if not random:
        raise RecipeError(f"{path}: no document draws random masks; leave `--mergekit-rng` out")
    for document in random:
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
