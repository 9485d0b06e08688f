"""`recipe.yaml`: a recipe with the sources it is for, complete enough to be merged again years later.

Imports: `recipe`, `sources`, `yamlfile`; never torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import RecipeError
from evomerge.recipe import Recipe
from evomerge.sources.reference import SourceRef, looks_like_path
from evomerge.sources.source_set import SourceSet, statistics_key
from evomerge.yamlfile import load_yaml


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; text that is a number in YAML 1.2 is quoted, and nothing is an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# PyYAML follows YAML 1.1, where `1e5` is text; our loader reads a number.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def recipe_document(
    recipe: Recipe, sources: SourceSet, scores: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The recipe as plain data: groups, seed, digest, sources with revisions and hashes, scores."""
    rows: dict[str, dict[str, Any]] = {}
    for row in sources.describe():
        ref = sources.refs[row["name"]]
        if looks_like_path(ref.text):  # also a folder of the hub's cache, whose commit it is not asked for
            entry: dict[str, Any] = {ref.key: str(sources.folders[row["name"]].resolve())}
        else:
            entry = {ref.key: ref.text, "revision": row["revision"]}
        entry["sha256"] = row["sha256"]
        if row["name"] in sources.statistics:
            found = sources.statistics[row["name"]]
            entry["statistics"] = [str(file.resolve()) for file in found.files]
            entry["statistics_sha256"] = found.sha256()
        rows[row["name"]] = {key: value for key, value in entry.items() if value is not None}
    document = {**recipe.as_json(), "digest": recipe.digest, "sources": rows}
    return {**document, "scores": dict(scores)} if scores else document


def write_yaml(path: Path, document: Mapping[str, Any], comment: str = "") -> None:
    """Write one document, keys in their order, with a comment on top."""
    path.write_text(_commented(comment) + dump_yaml(document), encoding="utf-8")


def dump_yaml(document: Mapping[str, Any]) -> str:
    """YAML text with keys in their order and short collections on one line."""
    return yaml.dump(
        dict(document),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=110,
        default_flow_style=None,
    )


def _commented(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def read_recipe(path: Path) -> tuple[Recipe, dict[str, SourceRef], dict[str, str]]:
    """A recipe, its sources and their expected SHA-256 by name.

    Relative source paths count from the recipe's folder.

    Raises:
        ConfigError: no such file, or not YAML.
        RecipeError: not a recipe, its digest does not match its content, or it names no sources.
    """
    data = load_yaml(path)
    recipe = Recipe.from_json(data, str(path))
    stated = data.get("digest")
    if stated is not None and stated != recipe.digest:
        raise RecipeError(
            f"{path}: the content has digest {recipe.digest[:12]}, but `digest` says {str(stated)[:12]}; "
            "remove the `digest` line if the recipe was changed on purpose"
        )
    sources = data.get("sources") or {}
    missing = [name for name in (recipe.base, *recipe.models) if name not in sources]
    if missing:
        raise RecipeError(f"{path}: `sources` has no entry for `{missing[0]}`; add its folder or hub id")
    refs = {name: _reference(sources[name], path, name) for name in (recipe.base, *recipe.models)}
    hashes = {name: str(row["sha256"]) for name, row in sources.items() if "sha256" in row}
    for name, row in sources.items():
        if "statistics_sha256" in row:
            hashes[statistics_key(name)] = str(row["statistics_sha256"])
    return recipe, refs, hashes


def _reference(row: Any, path: Path, name: str) -> SourceRef:
    if not isinstance(row, Mapping):
        raise RecipeError(f"{path}: `sources.{name}` is {row!r}, but it must hold `model` or `adapter`")
    place = {key: str(row[key]) for key in ("model", "adapter") if key in row}
    for key, text in place.items():
        beside = path.parent / text
        if not Path(text).is_absolute() and beside.exists():
            place[key] = str(beside.resolve())
    given = row.get("statistics") or ()
    files = (given,) if isinstance(given, str) else given
    # A folder has no revision, and a recipe written from one names none.
    return SourceRef(
        **place,
        revision=row.get("revision"),
        statistics=tuple(str((path.parent / str(file)).resolve()) for file in files),
    )
