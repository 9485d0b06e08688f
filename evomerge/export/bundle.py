"""Everything a finished run leaves behind in `best/`: recipe, mergekit YAML and, if asked for, the model.

Imports: `merge`, `sources`, `study.final`, `report.outcome`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evomerge.errors import ExportError
from evomerge.export.mergekit import is_random, mergekit_documents, mergekit_text, places
from evomerge.export.recipe_file import dump_yaml, recipe_document, write_yaml
from evomerge.merge.cast import CastMerge
from evomerge.merge.methods import SPECS
from evomerge.merge.methods.della import row_length
from evomerge.merge.plan import MergePlan
from evomerge.merge.writer import Say, planned, silent, write_model
from evomerge.recipe import Recipe
from evomerge.report.outcome import headline
from evomerge.sources.checkpoint import TORCH_DTYPES
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet
from evomerge.study.final import Result


def export_recipe(
    folder: Path, recipe: Recipe, sources: SourceSet, layout: Layout, result: Result
) -> list[str]:
    """Write `recipe.yaml` and `mergekit.yaml`; returns notes for the user (what mergekit cannot do)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(
        folder / "recipe.yaml",
        recipe_document(recipe, sources, scores_of(result)),
        f"{headline(result)}\nMerge with: evomerge merge recipe.yaml OUT",
    )
    target = folder / "mergekit.yaml"
    target.unlink(missing_ok=True)
    notes = [*_dtype_notes(sources), *buffer_notes(sources), *rank_notes(recipe, sources, layout)]
    try:
        documents = mergekit_documents(recipe, layout, SPECS, places(sources), base_dtype(sources))
    except ExportError as error:
        return [str(error)]
    target.write_text(mergekit_text(documents, SPECS, notes), encoding="utf-8")
    if is_random(documents, SPECS):
        notes.append(
            "mergekit draws other random masks; only `evomerge merge` gives the weights that were scored"
        )
    return notes


def export_model(
    folder: Path,
    recipe: Recipe,
    sources: SourceSet,
    layout: Layout,
    *,
    max_shard_bytes: int,
    card: str | None = None,
    dtype: str | None = None,
    say: Say = silent,
) -> Path:
    """Merge `recipe` and write it as a model folder, tensor by tensor.

    Args:
        folder: does not exist, or is empty.
        recipe: to merge.
        sources: of the recipe.
        layout: of the base.
        max_shard_bytes: most bytes of tensors in one file.
        card: text of README.md; None writes one.
        dtype: torch name of the dtype to write; None: that of the base, tensor by tensor.
        say: told of every shard.

    Raises:
        RecipeError: a method refuses its parameters, or the merged weights are not finite.
        ExportError: the folder is in use, or the disk is too small.
    """
    return write_model(
        folder,
        planned(sources.base, dtype),
        CastMerge(sources, MergePlan.compile(recipe, layout, SPECS), dtype),
        sources.folders[recipe.base],
        key=f"{recipe.digest} {sources.stamp()}",
        max_shard_bytes=max_shard_bytes,
        card=card if card is not None else model_card(folder.name, recipe, sources),
        metadata={"evomerge_recipe": recipe.digest},
        dtype=dtype,
        say=say,
    )


def base_dtype(sources: SourceSet) -> str:
    """Torch name of the floating dtype in which most of the base is stored."""
    return next(iter(_dtypes(sources)))


def _dtypes(sources: SourceSet) -> dict[str, int]:
    """Torch name of every floating dtype of the base -> bytes stored in it, most bytes first."""
    sizes: dict[str, int] = {}
    for name in sources.tensor_names:
        info = sources.base.tensors[name]
        if info.floating:
            dtype = TORCH_DTYPES[info.dtype]
            sizes[dtype] = sizes.get(dtype, 0) + info.nbytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _dtype_notes(sources: SourceSet) -> list[str]:
    """mergekit writes one dtype; a base that stores several is not reproduced to the last bit."""
    main, *others = _dtypes(sources)
    if not others:
        return []
    return [
        f"the base stores tensors in {main} and in {', '.join(others)}, but mergekit writes {main} only; "
        "`evomerge merge` keeps each tensor's dtype"
    ]


def buffer_notes(sources: SourceSet) -> list[str]:
    """mergekit asks GPT-NeoX checkpoints for buffers that today's transformers no longer stores.

    It merges adapters with transformers, so no adapter can be merged into such a model.
    """
    stored = any(name.endswith(".attention.masked_bias") for name in sources.base.tensors)
    adapters = [name for name in sources.models if sources.refs[name].adapter]
    if sources.base.config.get("model_type") != "gpt_neox" or (stored and not adapters):
        return []
    return [
        "mergekit 0.1.5 refuses GPT-NeoX models without the buffers `attention.bias`, "
        "`attention.masked_bias` and `rotary_emb.inv_freq`, which transformers no longer writes: the base or "
        "an adapter merged into it lacks them; merge with `evomerge merge recipe.yaml` instead"
    ]


def rank_notes(recipe: Recipe, sources: SourceSet, layout: Layout) -> list[str]:
    """mergekit's della divides by the number of entries of a row less one, and fails where that is 0."""
    for op in MergePlan.compile(recipe, layout, SPECS).ops:
        thinned = any(
            "epsilon" in values and values["density"] < 1.0 for values in op.setting.models.values()
        )
        if thinned and row_length(sources.base.tensors[op.tensor].shape) == 1:
            return [
                f"mergekit 0.1.5 cannot merge `{op.tensor}` by {op.setting.method}: its rows have one entry; "
                "merge with `evomerge merge recipe.yaml` instead"
            ]
    return []


def scores_of(result: Result) -> dict[str, Any]:
    """The winner's scores for its recipe file."""
    winner = result.winner
    scores: dict[str, Any] = {}
    if winner.calibration is not None:
        scores["calibration"] = round(winner.calibration, 6)
    if winner.selection is not None:
        scores["selection"] = round(winner.selection.value, 6)
    if winner.held_out is not None:
        scores["held_out"] = {
            "fitness": round(winner.held_out.value, 6),
            "interval": [round(winner.held_out.low, 6), round(winner.held_out.high, 6)],
            "items": result.items["held_out"],
            "tasks": {task: round(score.mean, 6) for task, score in (winner.tasks or {}).items()},
        }
    return scores


def model_card(name: str, recipe: Recipe, sources: SourceSet, outcome: str = "") -> str:
    """The model folder's README: sources, recipe and, where there is a run, its outcome in Markdown."""
    document = recipe_document(recipe, sources)
    rows = [
        f"- `{name}`: {row.get('model') or row.get('adapter')}" for name, row in document["sources"].items()
    ]
    scores = f"\n## Scores\n\n{outcome}" if outcome else ""
    return (
        "---\nlibrary_name: transformers\ntags:\n- merge\n- evomerge\n---\n\n"
        f"# {name}\n\nA merge made with evomerge.\n\n## Sources\n\n" + "\n".join(rows) + "\n"
        f"{scores}\n## Recipe\n\n```yaml\n{dump_yaml(document)}```\n"
    )
