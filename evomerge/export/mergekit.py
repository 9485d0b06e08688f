"""A recipe as mergekit YAML, so that `mergekit-yaml` or `mergekit-multi` 0.1.5 makes the same weights.

One method for all cells becomes one document whose coefficients are `filter` lists. Several methods become
one document per method and a last `linear` document that takes each tensor, with weight 1, from the stage
that owns it or from the base: 0 * x + 1 * y is y, bit by bit.

A filter is a substring of tensor names and the first match in a list wins.

Imports: `merge.methods`, `recipe`, `sources`; never torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evomerge.errors import ExportError
from evomerge.export.recipe_file import dump_yaml
from evomerge.merge.methods._gram import TASK_VECTORS
from evomerge.recipe import BASE_COPY, Cell, MethodSpec, Recipe, Setting
from evomerge.sources.layout import LAYER, Layout
from evomerge.sources.reference import commit_of, looks_like_path
from evomerge.sources.source_set import SourceSet

Value = float | bool
Place = str | dict[str, Any]  # mergekit's model reference: a text, or a mapping where the text is ambiguous
# a method, the source to name as `base_model` ("" for none), its models where a document can name only these
Kind = tuple[str, ...]

# a shared parameter with which a method without weights gives the base, bit by bit
KEEPS_BASE: Mapping[str, Mapping[str, Value]] = {
    "slerp": {"t": 0.0},  # on the way from the base
    "nearswap": {"t": 0.0},
    "sce": {"select_topk": 0.0},
    "ram": {"epsilon": 1e30},  # no entry of a task vector is that large
    "ramplus_tl": {"epsilon": 1e30},
}


def mergekit_documents(
    recipe: Recipe,
    layout: Layout,
    specs: Mapping[str, MethodSpec],
    places: Mapping[str, Place],
    out_dtype: str,
) -> list[dict[str, Any]]:
    """The recipe as one mergekit document, or several for `mergekit-multi`.

    A document has one order of models for all cells: the recipe's, after the base. Where a setting sums in
    another order, the last bit of float32 differs.

    Args:
        recipe: what to merge; parameters that it leaves out have their defaults.
        layout: cells of the base.
        specs: merge methods by name.
        places: mergekit's model reference by source name, from `places`.
        out_dtype: torch name of the base's dtype.

    Raises:
        ExportError: mergekit has not got one of the methods, or cannot read one of the paths.
        RecipeError: a setting is wrong.
    """
    settings = {cell: _complete(recipe.setting(cell), cell, specs) for cell in layout.by_cell}
    kinds: dict[Kind, list[Cell]] = {}
    for cell, setting in settings.items():
        if setting != BASE_COPY:
            kinds.setdefault(_kind(setting, specs, recipe.base), []).append(cell)
    for method, *_ in kinds:
        if specs[method].mergekit is None:
            raise ExportError(
                f"mergekit 0.1.5 has no method `{method}`; merge with `evomerge merge recipe.yaml` instead"
            )
    if not kinds:
        kinds[("linear", recipe.base)] = []
    kept = sum(map(len, kinds.values())) < len(settings)
    kind = next(iter(kinds))
    if len(kinds) == 1 and _has_config(kind) and (not kept or _can_keep_base(kind, specs)):
        document = _document(kind, settings, recipe, layout, specs, places)
        return [{**document, "dtype": "float32", "out_dtype": out_dtype}]
    _check_places([recipe.base, *(m for setting in settings.values() for m in setting.models)], places)
    documents = []
    for number, (kind, cells) in enumerate(kinds.items()):
        # What the last document does not take from this stage repeats a setting that the stage has anyway.
        own = [settings[cell] for cell in cells]
        filler = max(own, key=own.count)
        stage = {cell: settings[cell] if cell in cells else filler for cell in settings}
        document = _document(kind, stage, recipe, layout, specs, places)
        name = f"stage_{number:02d}"
        documents.append({"name": name, **document, "dtype": "float32", "out_dtype": "float32"})
    owner = {cell: documents[i]["name"] for i, cells in enumerate(kinds.values()) for cell in cells}
    return [*documents, _selection(settings, owner, layout, places[recipe.base], documents, out_dtype)]


def mergekit_text(
    documents: Sequence[Mapping[str, Any]], specs: Mapping[str, MethodSpec], notes: Sequence[str] = ()
) -> str:
    """The documents as YAML, with the command that runs them and `notes` in a comment on top."""
    if len(documents) == 1:
        command = "mergekit-yaml mergekit.yaml OUT"
    else:
        # absolute, because mergekit would ask the hub for a stage whose path has the form of an id
        command = "mergekit-multi mergekit.yaml -I $PWD/STAGES --out-path OUT"
    if any(_has_adapter(row["model"]) for document in documents for row in document["models"]):
        command += " --lora-merge-cache CACHE --lora-merge-dtype float32"
    lines = [f"For mergekit 0.1.5: {command}"]
    if len(documents) > 1:
        lines.append("STAGES must be a new folder: mergekit reuses the stages that it finds there.")
    if is_random(documents, specs):
        lines.append("Random masks: mergekit draws other masks than evomerge, so the weights will differ.")
        lines.append("`evomerge merge recipe.yaml OUT` gives the weights that were scored.")
    if any(document["merge_method"] == "arcee_fusion" for document in documents):
        lines += [
            "arcee_fusion: mergekit sums in float32, and of tensors above 1e6 entries it draws a sample to",
            "find the threshold: near it, weights differ from those of `evomerge merge recipe.yaml OUT`.",
        ]
    if any(
        document["merge_method"] == "multislerp" and len(document["models"]) > 2 for document in documents
    ):
        lines.append(
            "multislerp: mergekit stops at a tensor that has not changed in any of three or more models."
        )
    head = "".join(f"# {line}\n" for line in (*lines, *notes))
    return head + "---\n".join(dump_yaml(document) for document in documents)


def is_random(documents: Sequence[Mapping[str, Any]], specs: Mapping[str, MethodSpec]) -> bool:
    """Whether a document draws random masks, which mergekit draws in its own way."""
    random = {spec.mergekit for spec in specs.values() if spec.random}
    return any(document["merge_method"] in random for document in documents)


def places(sources: SourceSet) -> dict[str, Place]:
    """mergekit's model reference of every source: folder or `id@commit`; adapters ride on the base."""
    parts = {name: _path(sources, name) for name in (sources.base_name, *sources.models)}
    base = parts[sources.base_name]
    return {
        name: _reference(base, part) if sources.refs[name].adapter else _reference(part)
        for name, part in parts.items()
    }


def _path(sources: SourceSet, name: str) -> tuple[str, str | None]:
    ref, folder = sources.refs[name], sources.folders[name]
    if looks_like_path(ref.text):
        return str(folder.resolve()), None
    return ref.text, commit_of(folder) or ref.revision


def _reference(model: tuple[str, str | None], lora: tuple[str, str | None] | None = None) -> Place:
    """`path@revision+path@revision`, or the mapping form when a path contains one of the two signs."""
    parts = [model] if lora is None else [model, lora]
    if any(sign in path for path, _ in parts for sign in "+@"):
        rows = [{"path": path} | ({"revision": rev} if rev else {}) for path, rev in parts]
        return dict(zip(("model", "lora"), rows, strict=False))
    return "+".join(f"{path}@{rev}" if rev else path for path, rev in parts)


def _has_adapter(place: Place) -> bool:
    return "+" in place if isinstance(place, str) else "lora" in place


def _check_places(names: Iterable[str], places: Mapping[str, Place]) -> None:
    """`mergekit-multi` writes every reference as text again, and cannot read that with a sign too many."""
    for name in names:
        if not isinstance(places[name], str):
            raise ExportError(
                f"model `{name}` or the base has `+` or `@` in its path, which `mergekit-multi` cannot read, "
                "and the recipe needs several mergekit documents; rename the folder or merge with "
                "`evomerge merge recipe.yaml`"
            )


def _complete(setting: Setting, cell: Cell, specs: Mapping[str, MethodSpec]) -> Setting:
    return specs[setting.method].complete(setting, str(cell)) if setting.models else BASE_COPY


def _kind(setting: Setting, specs: Mapping[str, MethodSpec], base: str) -> Kind:
    """Settings of one kind fit one document; a weight of 0 takes a model out, where there are weights."""
    spec = specs[setting.method]
    free = "weight" in spec.per_model and spec.max_models is None
    # not normalised, multislerp copies a model that is alone but scales one among others of weight 0
    alone = setting.parameters.get("normalize_weights") is False
    role = _base_model(setting, base)
    return (setting.method, role) if free and not alone else (setting.method, role, *setting.models)


def _base_model(setting: Setting, base: str) -> str:
    """The source that a document must name as `base_model` to mean this setting; "" for none."""
    first = next(iter(setting.models))
    if setting.method == "passthrough" or not setting.parameters.get(TASK_VECTORS, True):
        return ""  # mergekit would take it for an input, or merge differences from it
    if setting.method == "slerp" and len(setting.models) == 2:
        return first
    if setting.method == "karcher" and base not in setting.models:
        return first  # a base that is not listed would join the mean
    return base


def _has_config(kind: Kind) -> bool:
    """Whether it is certain whose config and tokenizer mergekit takes for a document of this kind."""
    _, role, *models = kind
    return role != "" or len(models) == 1


def _can_keep_base(kind: Kind, specs: Mapping[str, MethodSpec]) -> bool:
    """Whether some setting of the kind gives the base: weights of 0, or what `KEEPS_BASE` says."""
    method, _, *models = kind
    free = method == "linear" or specs[method].min_models == 0
    return free or (method in KEEPS_BASE and (method != "slerp" or len(models) == 1))


def _document(
    kind: Kind,
    settings: Mapping[Cell, Setting],
    recipe: Recipe,
    layout: Layout,
    specs: Mapping[str, MethodSpec],
    places: Mapping[str, Place],
) -> dict[str, Any]:
    """One document over the whole model; `BASE_COPY` cells keep the base's tensors."""
    method, role, *models = kind
    spec = specs[method]
    if not models:
        models = [m for m in recipe.models if any(m in s.models for s in settings.values())]
        if method == "linear":  # where the base is an input like the others and needs a weight
            models = [recipe.base, *models]
    rows = []
    for model in models:
        values = {
            key: _filters(
                {c: _of_model(s, model, key, spec, recipe.base) for c, s in settings.items()}, layout
            )
            for key in spec.per_model
        }
        rows.append({"model": places[model], **({"parameters": values} if values else {})})
    shared = {
        key: _filters({c: _shared(s, key, method) for c, s in settings.items()}, layout, default.default)
        for key, default in spec.shared.items()
        if key != TASK_VECTORS
    }
    base = {"base_model": places[role]} if role else {}
    document = {"merge_method": spec.mergekit, **base, "models": rows}
    return {**document, **({"parameters": shared} if shared else {})}


def _of_model(setting: Setting, model: str, key: str, spec: MethodSpec, base: str) -> Value | None:
    if model in setting.models:
        return setting.models[model][key]
    if key == "density" and any(parameter.below for parameter in spec.per_model.values()):
        return 1.0  # with which any value of the other parameter is allowed
    if key != "weight":
        return None
    return float(spec.name == "linear" and setting == BASE_COPY and model == base)


def _shared(setting: Setting, key: str, method: str) -> Value | None:
    if setting != BASE_COPY:
        return setting.parameters[key]
    return KEEPS_BASE.get(method, {}).get(key)


def _selection(
    settings: Mapping[Cell, Setting],
    owner: Mapping[Cell, str],
    layout: Layout,
    base: Place,
    stages: Sequence[Mapping[str, Any]],
    out_dtype: str,
) -> dict[str, Any]:
    """The last document: each tensor from its stage, or from the base, which also gives the config."""
    names: list[tuple[str | None, Place]] = [(None, base), *((s["name"], s["name"]) for s in stages)]
    models = [
        {
            "model": place,
            "parameters": {
                "weight": _filters({cell: float(owner.get(cell) == name) for cell in settings}, layout)
            },
        }
        for name, place in names
    ]
    return {
        "merge_method": "linear",
        "base_model": base,
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": out_dtype,
    }


def _filters(
    values: Mapping[Cell, Value | None], layout: Layout, unused: Value | None = None
) -> Value | list[dict[str, Any]]:
    """A scalar, or a short list of filters that gives every tensor the value of its cell.

    Args:
        values: None where any value will do.
        layout: the cells' tensors.
        unused: the value when any will do everywhere.
    """
    known = [value for value in values.values() if value is not None]
    if not known:
        return 1.0 if unused is None else unused
    default = max(dict.fromkeys(known), key=known.count)
    table = {
        tensor: value
        for cell, value in values.items()
        if value is not None
        for tensor in layout.by_cell[cell]
    }
    rows: dict[str, Value] = {}
    for tensor, value in table.items():
        if value == default or any(text in tensor for text in rows):
            continue
        for text in _candidates(tensor):
            if all(other == value for name, other in table.items() if text in name):
                rows[text] = value
                break
        else:  # no part tells it from its neighbours: full names, also of those that contain this one
            rows.update({name: other for name, other in table.items() if tensor in name})
    if not rows:
        return default
    ordered = sorted(rows.items(), key=lambda row: -len(row[0]))
    return [*({"filter": text, "value": value} for text, value in ordered), {"value": default}]


def _candidates(tensor: str) -> Iterator[str]:
    """`.mlp.`, `.mlp.up_proj.`, then `model.layers.3.`, `model.layers.3.mlp.`; the dot keeps 3 from 30."""
    match = LAYER.search(tensor)
    if match:
        parts = tensor[match.end() :].split(".")
        for end in range(1, len(parts)):
            yield "." + ".".join(parts[:end]) + "."
        for end in range(len(parts)):
            yield tensor[: match.end()] + "".join(f"{part}." for part in parts[:end])
