"""A recipe as mergekit YAML, so that `mergekit-yaml` or `mergekit-multi` 0.1.5 makes the same weights.

One method for all cells becomes one document whose coefficients are `filter` lists. Several methods become
one document per method and a last `linear` document that takes each tensor from the stage that owns it.
Filters are substrings of tensor names and the first match wins; every list is checked against every tensor.

Imports: `recipe`, `sources`; never torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evomerge.errors import ExportError
from evomerge.export.recipe_file import dump_yaml
from evomerge.recipe import BASE_COPY, Cell, MethodSpec, Recipe, Setting
from evomerge.sources.layout import LAYER, Layout
from evomerge.sources.reference import SourceRef

Value = float | bool
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def mergekit_documents(
    recipe: Recipe,
    layout: Layout,
    specs: Mapping[str, MethodSpec],
    places: Mapping[str, str],
    out_dtype: str,
) -> list[dict[str, Any]]:
    """The recipe as one mergekit document, or several for `mergekit-multi`.

    Args:
        recipe: in canonical form.
        layout: cells of the base.
        specs: merge methods by name.
        places: mergekit's model reference by source name (`folder`, `id@revision`, `model+adapter`).
        out_dtype: torch name of the base's dtype.

    Raises:
        ExportError: mergekit has not got one of the methods.
    """
    settings = {cell: recipe.setting(cell) for cell in layout.by_cell}
    kinds: dict[tuple[str, ...], list[Cell]] = {}
    for cell, setting in settings.items():
        if setting != BASE_COPY:
            kinds.setdefault(_kind(setting), []).append(cell)
    for method, *_ in kinds:
        if specs[method].mergekit is None:
            raise ExportError(
                f"mergekit 0.1.5 has no method `{method}`; merge with `evomerge merge recipe.yaml` instead"
            )
    # A slerp of two models has no setting that gives the base; every other method has.
    copies = [cell for cell, setting in settings.items() if setting == BASE_COPY]
    if copies and not any(len(kind) == 1 for kind in kinds):
        kinds[("task_arithmetic",)] = []
    stages = []
    for kind, cells in kinds.items():
        own = {c: settings[c] if c in set(cells) else None for c in settings}
        stages.append(_document(kind, own, recipe, layout, specs[kind[0]], places))
    if len(stages) == 1:
        return [{**stages[0], "dtype": "float32", "out_dtype": out_dtype}]
    names = [f"stage_{i:02d}" for i in range(len(stages))]
    documents = [
        {"name": name, **stage, "dtype": "float32", "out_dtype": "float32"}
        for name, stage in zip(names, stages, strict=True)
    ]
    owner = {cell: i for i, cells in enumerate(kinds.values()) for cell in cells}
    owner |= dict.fromkeys(copies, next((i for i, kind in enumerate(kinds) if len(kind) == 1), 0))
    models = [
        {
            "model": name,
            "parameters": {"weight": _filters({c: float(owner[c] == i) for c in settings}, layout)},
        }
        for i, name in enumerate(names)
    ]
    documents.append(
        {
            "merge_method": "linear",
            "base_model": names[0],
            "models": models,
            "parameters": {"normalize": False},
            "dtype": "float32",
            "out_dtype": out_dtype,
        }
    )
    return documents


def mergekit_text(documents: Sequence[Mapping[str, Any]], specs: Mapping[str, MethodSpec]) -> str:
    """The documents as YAML, with the command that runs them in a comment on top."""
    if len(documents) == 1:
        command = "mergekit-yaml mergekit.yaml OUT --lora-merge-cache CACHE --lora-merge-dtype float32"
    else:
        command = (
            "mergekit-multi mergekit.yaml -I EMPTY_FOLDER --out-path OUT "
            "--lora-merge-cache CACHE --lora-merge-dtype float32"
        )
    lines = [f"# For mergekit 0.1.5: {command}"]
    if any(specs[d["merge_method"]].random for d in documents):
        lines.append("# Random masks: mergekit draws other masks than evomerge, so the weights will differ.")
        lines.append("# `evomerge merge recipe.yaml OUT` gives the weights that were scored.")
    return "\n".join(lines) + "\n" + "---\n".join(dump_yaml(document) for document in documents)


def places(recipe: Recipe, refs: Mapping[str, SourceRef], folders: Mapping[str, str]) -> dict[str, str]:
    """mergekit's model reference of every source: folder or `id@revision`; adapters ride on the base."""

    def place(name: str) -> str:
        ref = refs[name]
        return f"{ref.text}@{ref.revision}" if ref.revision else folders[name]

    base = place(recipe.base)
    return {
        name: f"{base}+{place(name)}" if refs[name].adapter else place(name)
        for name in (recipe.base, *recipe.models)
    }


def torch_dtype_name(safetensors_dtype: str) -> str:
    """`bfloat16` for `BF16` and so on."""
    return _DTYPES[safetensors_dtype]


def _kind(setting: Setting) -> tuple[str, ...]:
    """Settings of one kind fit one document: the same method and, for slerp, the same two models."""
    pair = setting.method == "slerp" and len(setting.models) == 2
    return (setting.method, *setting.models) if pair else (setting.method,)


def _document(
    kind: tuple[str, ...],
    settings: Mapping[Cell, Setting | None],
    recipe: Recipe,
    layout: Layout,
    spec: MethodSpec,
    places: Mapping[str, str],
) -> dict[str, Any]:
    """One document over the whole model; cells with None keep the base's tensors."""
    chosen = {cell: setting for cell, setting in settings.items() if setting is not None}
    active = [m for m in (recipe.base, *recipe.models) if any(m in s.models for s in chosen.values())]
    base, models = places[recipe.base], active or list(recipe.models[:1])
    if len(kind) == 3:
        base = places[kind[1]]
    if spec.name == "linear" and len(chosen) < len(settings):
        models = [recipe.base, *active]
    rows = []
    for model in models:
        row: dict[str, Any] = {"model": places[model]}
        parameters = {
            key: _filters(
                {c: _model_value(s, model, key, spec, recipe.base) for c, s in settings.items()}, layout
            )
            for key in spec.per_model
        }
        rows.append({**row, "parameters": parameters} if parameters else row)
    shared = {
        key: _filters({c: _shared_value(s, key, spec) for c, s in settings.items()}, layout)
        for key in spec.shared
    }
    document: dict[str, Any] = {"merge_method": spec.mergekit, "base_model": base, "models": rows}
    return {**document, "parameters": shared} if shared else document


def _model_value(setting: Setting | None, model: str, key: str, spec: MethodSpec, base: str) -> Value:
    if setting is not None and model in setting.models:
        return setting.models[model][key]
    if key == "weight":
        return 1.0 if spec.name == "linear" and setting is None and model == base else 0.0
    default = spec.per_model[key].default
    return 1.0 if default is None else default


def _shared_value(setting: Setting | None, key: str, spec: MethodSpec) -> Value:
    if setting is not None:
        return setting.parameters[key]
    default = spec.shared[key].default
    return 0.0 if default is None else default  # slerp's t: 0 is its first model


def _filters(values: Mapping[Cell, Value], layout: Layout) -> Value | list[dict[str, Any]]:
    """A scalar, or the shortest list of filters that gives every tensor the value of its cell."""
    table = {tensor: values[cell] for cell, tensors in layout.by_cell.items() for tensor in tensors}
    counts = list(table.values())
    default = max(dict.fromkeys(counts), key=counts.count)
    if len(set(counts)) == 1:
        return default
    chosen: dict[str, Value] = {}
    for tensor, value in table.items():
        if value != default and not any(text in tensor for text in chosen):
            chosen[_widest(tensor, value, table)] = value
    rows = sorted(chosen.items(), key=lambda row: -len(row[0]))
    for tensor, value in table.items():
        found = next((v for text, v in rows if text in tensor), default)
        if found != value:
            raise ExportError(
                f"tensor `{tensor}`: no mergekit filter tells it from its neighbours; "
                "merge with `evomerge merge recipe.yaml` instead"
            )
    return [*({"filter": text, "value": value} for text, value in rows), {"value": default}]


def _widest(tensor: str, value: Value, table: Mapping[str, Value]) -> str:
    """The shortest leading part of a tensor's name whose every match has this value."""
    return next(
        (text for text in _prefixes(tensor) if all(v == value for name, v in table.items() if text in name)),
        tensor,
    )


def _prefixes(tensor: str) -> Iterator[str]:
    """`model.layers.3.`, `model.layers.3.mlp.` and so on; the final dot keeps 3 apart from 30."""
    match = LAYER.search(tensor)
    parts = tensor.split(".")
    first = tensor[: match.end()].count(".") if match else len(parts)
    for end in range(first, len(parts)):
        yield ".".join(parts[:end]) + "."
