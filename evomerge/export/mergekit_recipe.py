"""A mergekit file as a recipe, so that an engine can hold the merge without a folder of it.

Imports: `evomerge.errors`, `recipe`, `sources`, `export.mergekit_merge`.
"""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import RecipeError
from evomerge.export.mergekit_document import Document
from evomerge.export.mergekit_layers import whole_outputs
from evomerge.export.mergekit_merge import MergekitRun, operations
from evomerge.export.mergekit_reader import read_mergekit
from evomerge.merge.plan import TensorOp
from evomerge.recipe import Cell, Recipe
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet


def mergekit_recipe(path: Path, *, seed: int = 0) -> tuple[Recipe, SourceSet, Layout]:
    """The recipe that gives what `merge_mergekit` writes, in the base's dtype whatever the file says.

    Args:
        path: one document of whole models, whose settings are the same for all tensors of a cell.
        seed: of random masks, in [0, 2**32).

    Raises:
        RecipeError: the file cannot be a recipe; the message says how to go on.
        SourceError: a model cannot be read, or does not fit the others.
    """
    remedy = f"merge it with `evomerge merge {path} FOLDER` and give FOLDER instead"
    *stages, document = read_mergekit(path)
    if stages or document.slices or _needs_stage(document):
        kind = (
            "several documents"
            if stages
            else "`slices`"
            if document.slices
            else "an adapter of another model"
        )
        raise RecipeError(f"{path}: a file with {kind} is no single recipe; {remedy}")
    sources, names = MergekitRun(path.parent, path.parent, {}, seed).open(document)
    cells: dict[Cell, TensorOp] = {}
    for op in operations(whole_outputs(document, sources), names, seed, sources.base_name):
        first = cells.setdefault(op.cell, op)
        if first.setting != op.setting:
            raise RecipeError(
                f"{path}: `{first.tensor}` and `{op.tensor}` of {op.cell} have different settings, and a "
                f"recipe has one for both; {remedy}"
            )
    settings = {cell: op.setting for cell, op in cells.items()}
    return Recipe(sources.base_name, sources.models, settings, seed), sources, sources.layout()


def _needs_stage(document: Document) -> bool:
    """Whether a model is an adapter's and not the base's, so that it must be made whole first."""
    root, inputs = document.refs[0], [ref for ref, _ in document.models]
    whole_base = root.lora is not None and root not in inputs
    return whole_base or any(ref.lora and ref.plain != root.plain for ref in inputs)
