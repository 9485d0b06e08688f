"""mergekit's YAML, read strictly: documents as data, and every parameter as a function of the tensor.

    document = read_mergekit(Path("merge.yaml"))[-1]
    setting = document.setting(tensor, t, names)

What mergekit 0.1.5 ignores is an error here: an unknown key or parameter is a typing error that would change
nothing there. What it has and evomerge has not is an error that says so.

A parameter is a scalar, a gradient (a list of numbers over the depth) or a list of `{filter, value}`. A
filter is a substring of the tensor's name; the first that matches wins, and when none does the next level
is asked: first the model's own `parameters`, then those of the document, then the method's default. A
gradient is linear in t, which is 0 at the first layer and 1 at the last; tensors outside the layers have
t = 0. Booleans are not interpolated: the entry at floor(t * (count - 1)) counts.

Imports: `merge.methods`, `sources.reference`, `yamlfile`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evomerge.errors import ConfigError, RecipeError
from evomerge.merge.methods import METHODS, SPECS
from evomerge.merge.methods._gram import TASK_VECTORS
from evomerge.recipe import MethodSpec, Setting
from evomerge.yamlfile import _Loader, suggestion

Value = float | bool

KEYS = ("name", "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
UNSUPPORTED = ("slices", "modules", "chat_template")  # mergekit has them, evomerge has not
TOKENIZER = ("tokenizer_source", "tokenizer")  # supported where they ask for the base's
IGNORED = ("int8_mask",)  # saves memory in mergekit; the result is the same
DTYPES = ("float32", "bfloat16", "float16")
# methods that merge whole models, where the base is one of them
BASE_AS_INPUT = ("linear", "slerp", "karcher", "passthrough")


class ModelRef(NamedTuple):
    """`path@revision+lora@revision`; `path` may be the name of an earlier document."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    @property
    def plain(self) -> ModelRef:
        """The model without its adapter."""
        return ModelRef(self.path, self.revision)

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        lora = f"{self.lora}@{self.lora_revision}" if self.lora_revision else self.lora
        return f"{model}+{lora}" if lora else model


class Row(NamedTuple):
    """One line of a parameter: the points of its gradient, for tensors whose name contains `filter`."""

    filter: str | None
    points: tuple[Value, ...]

    def at(self, t: float) -> Value:
        """The value at depth t in [0, 1]."""
        points, last = self.points, len(self.points) - 1
        if isinstance(points[0], bool):
            return points[int(t * last)]
        below = int(t * last)
        fraction = t * last - below
        return (1.0 - fraction) * points[below] + fraction * points[min(last, below + 1)]


Parameters = Mapping[str, tuple[Row, ...]]


@dataclass(frozen=True)
class Document:
    """One merge.

    Attributes:
        where: begins the message of an error.
        name: under which other documents use the result; None for the one that is wanted.
        spec: the method.
        base: the base model, if the document names one.
        models: models and their own parameters, in order; never the base where the method merges
            differences from it.
        parameters: of the document.
        dtype: torch name of the dtype written, None for the base's.
        computed_in: torch name of the dtype in which mergekit computes, None for that of its inputs.
        base_tokens: whether it asks for the base's tokenizer by name.
    """

    where: str
    name: str | None
    spec: MethodSpec
    base: ModelRef | None
    models: tuple[tuple[ModelRef, Parameters], ...]
    parameters: Parameters
    dtype: str | None = None
    computed_in: str | None = None
    base_tokens: bool = False

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """Every model that is read, the base first."""
        named = [ref for ref, _ in self.models]
        return tuple(dict.fromkeys([self.base, *named] if self.base else named))

    def setting(self, tensor: str, t: float, names: Mapping[ModelRef, str]) -> Setting:
        """The complete setting of one tensor; `names` are the models' names in it.

        Raises:
            RecipeError: a value is missing or out of its range.
        """
        models = {
            names[ref]: _values(self.spec.per_model, (own, self.parameters), tensor, t)
            for ref, own in self.models
        }
        shared = _values(self.spec.shared, (self.parameters,), tensor, t)
        if TASK_VECTORS in self.spec.shared:
            shared[TASK_VECTORS] = self.base is not None
        where = f"{self.where}, tensor `{tensor}`"
        return self.spec.complete(Setting(self.spec.name, shared, models), where)


def is_mergekit(path: Path) -> bool:
    """Whether a YAML file is mergekit's (true) or a recipe of ours (false).

    Raises:
        ConfigError: no such file, or not YAML.
        RecipeError: it is neither.
    """
    documents = _load(path)
    if any(isinstance(document, dict) and "merge_method" in document for document in documents):
        return True
    if documents and isinstance(documents[0], dict) and "evomerge_recipe" in documents[0]:
        return False
    raise RecipeError(
        f"{path}: neither a recipe of evomerge, which has the key `evomerge_recipe`, nor a mergekit file, "
        "which has `merge_method`; give one of the two"
    )


def read_mergekit(path: Path) -> list[Document]:
    """The documents of a mergekit file in an order in which they can be merged; the last is the result.

    Raises:
        ConfigError: no such file, or not YAML.
        RecipeError: what is wrong or not supported, and where.
    """
    raw = [document for document in _load(path) if document is not None]
    documents = []
    for number, data in enumerate(raw):
        where = str(path) if len(raw) == 1 else f"{path}, document {number + 1}"
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: it is {data!r}, but must be a mapping of keys to values")
        documents.append(_document(data, where))
    if len(documents) == 1:
        return documents
    return _ordered(documents, path)


def _load(path: Path) -> list[Any]:
    try:
        return list(yaml.load_all(path.read_text(encoding="utf-8-sig"), Loader=_Loader))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}; correct the file") from error


def _ordered(documents: Sequence[Document], path: Path) -> list[Document]:
    """Stages before the documents that use them; the one without a name last."""
    by_name = {document.name: document for document in documents}
    if len(by_name) < len(documents):
        raise RecipeError(f"{path}: two documents have the same `name`, or none; all but one need their own")
    if None not in by_name:
        raise RecipeError(f"{path}: every document has a `name`; leave it out of the one that is the result")
    ordered: list[Document] = []

    def visit(document: Document, users: tuple[str | None, ...]) -> None:
        if document.name in users:
            raise RecipeError(f"{document.where}: `{document.name}` uses itself; break the circle")
        if document not in ordered:
            for ref in document.refs:
                if ref.path in by_name:
                    visit(by_name[ref.path], (*users, document.name))
            ordered.append(document)

    visit(by_name[None], ())
    for document in documents:
        if document not in ordered:
            raise RecipeError(
                f"{document.where}: the result does not use `{document.name}`; remove the document, or merge "
                "it from a file of its own"
            )
    return ordered


def _document(data: Mapping[str, Any], where: str) -> Document:
    _check_keys(data, where)
    spec = _method(data, where)
    base = _reference(data["base_model"], f"{where}: `base_model`") if data.get("base_model") else None
    rows = data.get("models")
    if not isinstance(rows, list) or not rows:
        raise RecipeError(f"{where}: `models` is {rows!r}, but it must be a list of models; add them")
    models = [_model(row, spec, f"{where}: `models[{number}]`") for number, row in enumerate(rows)]
    known = [name for name in (*spec.per_model, *spec.shared) if name != TASK_VECTORS]
    parameters = _parameters(data.get("parameters"), known, f"{where}: `parameters`")
    for number, (ref, _) in enumerate(models):
        if ref in [earlier for earlier, _ in models[:number]]:
            raise RecipeError(f"{where}: `models[{number}]` is `{ref}` again; name every model once")
    for key in ("dtype", "out_dtype"):
        if data.get(key) not in (None, *DTYPES):
            raise RecipeError(f"{where}: `{key}` is {data[key]!r}; evomerge writes {', '.join(DTYPES)}")
    return Document(
        where=where,
        name=data.get("name"),
        spec=spec,
        base=base,
        models=_inputs(spec, base, models, where, parameters),
        parameters=parameters,
        dtype=data.get("out_dtype") or data.get("dtype"),
        computed_in=data.get("dtype"),
        base_tokens=any(key in data for key in TOKENIZER),
    )


def _check_keys(data: Mapping[str, Any], where: str) -> None:
    for key, value in data.items():
        if key in UNSUPPORTED and value is not None:
            raise RecipeError(
                f"{where}: `{key}` is not supported yet; evomerge merges whole models given as `models`, "
                "with the base's tokenizer and chat template"
            )
        source = value.get("source") if key == "tokenizer" and isinstance(value, dict) else value
        more = key == "tokenizer" and isinstance(value, dict) and len(value) > 1
        if key in TOKENIZER and (source != "base" or more):
            raise RecipeError(
                f"{where}: `{key}` is {value!r}, which is not supported yet; evomerge keeps the base's "
                "tokenizer: remove the key or ask for `base`"
            )
        if key not in (*KEYS, *UNSUPPORTED, *TOKENIZER):
            raise RecipeError(f"{where}: unknown key `{key}`; {suggestion(str(key), KEYS)}")
    if not isinstance(data.get("name"), str | None):
        raise RecipeError(f"{where}: `name` is {data['name']!r}, but it must be text; quote it")


def _method(data: Mapping[str, Any], where: str) -> MethodSpec:
    known = {spec.mergekit: spec for spec in SPECS.values() if spec.mergekit is not None}
    name = str(data.get("merge_method"))
    if name not in known:
        raise RecipeError(
            f"{where}: `merge_method` is `{name}`, which evomerge has not got; it has: {', '.join(known)}"
        )
    return known[name]


def _model(row: Any, spec: MethodSpec, where: str) -> tuple[ModelRef, Parameters]:
    if not isinstance(row, dict) or "model" not in row:
        raise RecipeError(f"{where} is {row!r}, but it must be a mapping with the key `model`")
    for key in row:
        if key not in ("model", "parameters"):
            raise RecipeError(
                f"{where}: unknown key `{key}`; {suggestion(str(key), ('model', 'parameters'))}"
            )
    own = row.get("parameters")
    for key in own if isinstance(own, dict) else ():
        if key in spec.shared:
            raise RecipeError(
                f"{where}: `{key}` holds for all models of {spec.name}; move it to the document's "
                "`parameters`"
            )
    return _reference(row["model"], where), _parameters(own, tuple(spec.per_model), where)


def _reference(data: Any, where: str) -> ModelRef:
    """A model reference from its text or its mapping form."""
    if isinstance(data, str):
        model, _, lora = data.partition("+")
        return ModelRef(*_revision(model), *(_revision(lora) if lora else ()))
    if isinstance(data, dict) and "model" in data:
        for key in data:
            if key not in ("model", "lora"):
                raise RecipeError(f"{where}: `{key}` is not supported yet; a model has `model` and `lora`")
        adapter = data.get("lora")
        return ModelRef(*_path(data["model"], where), *(_path(adapter, where) if adapter else ()))
    raise RecipeError(f"{where} is {data!r}, but a model is `path@revision+lora`, or a mapping with `model`")


def _revision(text: str) -> tuple[str, str | None]:
    path, _, revision = text.partition("@")
    return path, revision or None


def _path(data: Any, where: str) -> tuple[str, str | None]:
    if isinstance(data, str):
        return _revision(data)
    if isinstance(data, dict) and "path" in data and set(data) <= {"path", "revision"}:
        return str(data["path"]), data.get("revision")
    raise RecipeError(f"{where}: {data!r} must be a text, or a mapping with `path` and `revision`")


def _inputs(
    spec: MethodSpec,
    base: ModelRef | None,
    models: Sequence[tuple[ModelRef, Parameters]],
    where: str,
    parameters: Parameters,
) -> tuple[tuple[ModelRef, Parameters], ...]:
    """The models that take part, in mergekit's order and with mergekit's roles of the base."""
    needs_base = spec.name == "slerp" or spec.name not in BASE_AS_INPUT
    if base is None and needs_base and TASK_VECTORS not in spec.shared:
        raise RecipeError(f"{where}: `base_model` is missing, and {spec.name} needs one; add it")
    if METHODS[spec.name].takes_base and spec.name not in BASE_AS_INPUT:
        raise RecipeError(f"{where}: `merge_method: {spec.mergekit}` cannot be read yet; merge with mergekit")
    others = [(ref, own) for ref, own in models if ref != base]
    if spec.name == "slerp" and base is not None:
        if len(others) != 1:
            raise RecipeError(
                f"{where}: slerp has {len(others)} models beside `base_model`, but it needs exactly one"
            )
        return ((base, {}), *others)
    if spec.name not in BASE_AS_INPUT:
        return tuple(others)
    if base is not None and len(others) == len(models):
        if spec.name == "passthrough":
            raise RecipeError(
                f"{where}: `base_model` is not the model of passthrough, and would be a second one; remove it"
            )
        if "weight" in spec.per_model and "weight" not in parameters:
            raise RecipeError(
                f"{where}: `base_model` is not one of `models`, and linear averages it like the others; add "
                "it to `models` with a weight, or remove `base_model`"
            )
        return (*models, (base, {}))
    return tuple(models)


def _parameters(data: Any, names: Sequence[str], where: str) -> Parameters:
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is {data!r}, but it must be a mapping of names to values")
    for key in data:
        if key not in (*names, *IGNORED):
            raise RecipeError(f"{where}: unknown parameter `{key}`; {suggestion(str(key), names)}")
    return {key: _rows(data[key], f"{where}, `{key}`") for key in names if key in data}


def _rows(data: Any, where: str) -> tuple[Row, ...]:
    """A scalar, a gradient, a list of `{filter, value}` or one such mapping."""
    if isinstance(data, dict):
        data = [data]
    if not (isinstance(data, list) and any(isinstance(item, dict) for item in data)):
        return (Row(None, _points(data, where)),)
    rows = []
    for item in data:
        if not isinstance(item, dict) or "value" not in item or not set(item) <= {"filter", "value"}:
            raise RecipeError(f"{where}: {item!r} must be a mapping with `value` and perhaps `filter`")
        text = item.get("filter")
        if not isinstance(text, str | None):
            raise RecipeError(f"{where}: `filter` is {text!r}, but it must be text; quote it")
        rows.append(Row(None if text == "*" else text, _points(item["value"], where)))
    return tuple(rows)


def _points(data: Any, where: str) -> tuple[Value, ...]:
    items = data if isinstance(data, list) else [data]
    if items and all(isinstance(item, bool) for item in items):
        return tuple(items)
    if items and all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        return tuple(map(float, items))
    raise RecipeError(
        f"{where} is {data!r}, but it must be a number or a boolean, a list of one of the two, or a list of "
        "`{filter, value}`"
    )


def _values(
    names: Mapping[str, object], levels: Sequence[Parameters], tensor: str, t: float
) -> dict[str, Any]:
    """The values that the file gives for one tensor; what no level gives is left out."""
    result: dict[str, Any] = {}
    for name in names:
        rows = (row for level in levels for row in level.get(name, ()))
        row = next((row for row in rows if row.filter is None or row.filter in tensor), None)
        if row is not None:
            result[name] = row.at(t)
    return result
