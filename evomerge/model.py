"""One model without a search: merge a recipe into a folder, score a folder or a recipe.

Imports: `engine`, `evaluate`, `export`, `sources`, `errors`, `recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evomerge.engine.factory import Kind, open_engine
from evomerge.errors import ConfigError, SourceError
from evomerge.evaluate.evaluator import evaluate, subset
from evomerge.evaluate.items import Split
from evomerge.evaluate.score import Score, aggregate, score_tasks
from evomerge.evaluate.task import Suite
from evomerge.export.bundle import export_model
from evomerge.export.mergekit_merge import merge_mergekit
from evomerge.export.mergekit_reader import is_mergekit
from evomerge.export.mergekit_recipe import mergekit_recipe
from evomerge.export.recipe_file import read_recipe
from evomerge.merge.writer import Say, silent
from evomerge.recipe import Recipe
from evomerge.sources.layout import Layout
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from evomerge.yamlfile import file_size

WRITTEN = ("bfloat16", "float16", "float32")  # dtypes that a model can be written in


def open_recipe(path: Path, *, changed: bool = False) -> tuple[Recipe, SourceSet, Layout]:
    """A recipe file with its sources.

    Args:
        path: our `recipe.yaml`.
        changed: accept sources whose content is not what the recipe was scored with.

    Raises:
        RecipeError: the recipe is wrong, or a source has changed.
        SourceError: a source cannot be read.
    """
    recipe, refs, hashes = read_recipe(path)
    base = refs.pop(recipe.base)
    sources = SourceSet.open(base, refs, recipe.base)
    if not changed:
        for name, found in sources.hashes().items():
            if hashes.get(name, found) != found:
                raise SourceError(
                    f"{path}: source `{name}` has SHA-256 {found[:12]}, but the recipe was made with "
                    f"{hashes[name][:12]}; restore it, or pass --allow-changed to merge what is there"
                )
    return recipe, sources, sources.layout(recipe.modules)


def merge_model(
    recipe: Path | str,
    out: Path | str,
    *,
    max_shard_size: str | int = "5GB",
    dtype: str | None = None,
    allow_changed: bool = False,
    mergekit_rng: int | None = None,
    say: Say = silent,
) -> Path:
    """Merge a recipe file, or a mergekit YAML, into a model folder; returns the folder.

    Tensors are merged in float32 and rounded once: to `dtype` (a torch name), or each to its own in the base
    (None; a mergekit file may say otherwise). A merge that was killed goes on at its first missing shard. No
    file is larger than `max_shard_size`, bytes or a size such as `500MB`, but where one tensor is.

    `mergekit_rng` (mergekit files only) draws the masks that mergekit draws with that `--random-seed`; see
    `evomerge.merge.replay` for when the result has mergekit's bits.

    Raises:
        EvomergeError: what is wrong, and what to change.
    """
    if dtype not in (None, *WRITTEN):
        raise ConfigError(f"dtype is {dtype!r}; it can be {', '.join(WRITTEN)}")
    path, max_shard_bytes = Path(recipe), file_size(max_shard_size, "max_shard_size")
    if is_mergekit(path):
        return merge_mergekit(
            path, Path(out), max_shard_bytes=max_shard_bytes, dtype=dtype, mergekit_rng=mergekit_rng, say=say
        )
    if mergekit_rng is not None:
        raise ConfigError(
            f"{path} is a recipe of evomerge, whose masks are its own; `--mergekit-rng` is for mergekit "
            "files, such as the `mergekit.yaml` that a run exports beside its recipe"
        )
    opened, sources, layout = open_recipe(path, changed=allow_changed)
    return export_model(
        Path(out), opened, sources, layout, max_shard_bytes=max_shard_bytes, dtype=dtype, say=say
    )


def evaluate_model(
    model: Path | str,
    fitness: Path | str,
    *,
    split: Split = "selection",
    limit: int | None = None,
    engine: Kind = "auto",
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[Mapping[str, Score], float]:
    """Scores per task and fitness of a model folder, a hub id or a recipe file, on one split.

    A mergekit YAML is a recipe file too where one recipe can say the same (`mergekit_recipe`).

    Raises:
        EvomergeError: what is wrong, and what to change.
    """
    suite = Suite.load(fitness, {split: limit} if limit else None)
    text = str(model)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        recipe, sources, layout = mergekit_recipe(path) if is_mergekit(path) else open_recipe(path)
    else:
        sources = SourceSet.open(SourceRef(model=text), {})
        layout, recipe = sources.layout(), Recipe(sources.base_name, (), {})
    opened = open_engine(sources, layout, kind=engine, device=device, dtype=dtype)
    try:
        opened.load(recipe)
        with suite.unsealed():
            scores = score_tasks(evaluate(opened, suite, subset(suite, split)))
    finally:
        opened.close()
    # Without a run there is no best source to normalise by.
    kind = "mean" if suite.aggregate == "normalized" else suite.aggregate
    return scores, aggregate(scores, suite.weights, kind).value
