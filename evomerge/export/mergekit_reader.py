"""mergekit's YAML, read strictly: documents as data, and every parameter as a function of the tensor.

    document = read_mergekit(Path("merge.yaml"))[-1]
    setting = document.setting(tensor, t, names)

What mergekit 0.1.5 ignores is an error here: an unknown key or parameter is a typing error that would change
nothing there. What it has and evomerge has not is an error that says so.

Where no filter of a parameter matches, the next level is asked: first the model's own `parameters`, then
those of the slice, those of the document, and the method's default.

Imports: `merge.methods`, `export.mergekit_document`, `yamlfile`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.errors import RecipeError
from evomerge.export.mergekit_document import Document, sliced, whole_models
from evomerge.export.mergekit_values import parameters, reference
from evomerge.merge.methods import SPECS
from evomerge.recipe import MethodSpec
from evomerge.yamlfile import load_documents, suggestion

KEYS = ("name", "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
UNSUPPORTED = ("modules", "chat_template")  # mergekit has them, evomerge has not
TOKENIZER = ("tokenizer_source", "tokenizer")  # supported where they ask for the base's
DTYPES = ("float32", "bfloat16", "float16")


def is_mergekit(path: Path) -> bool:
    """Whether a YAML file is mergekit's (true) or a recipe of ours (false).

    Raises:
        ConfigError: no such file, or not YAML.
        RecipeError: it is neither.
    """
    documents = load_documents(path)
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
    raw = [document for document in load_documents(path) if document is not None]
    documents = []
    for number, data in enumerate(raw):
        where = str(path) if len(raw) == 1 else f"{path}, document {number + 1}"
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: it is {data!r}, but must be a mapping of keys to values")
        documents.append(_document(data, where))
    if len(documents) == 1:
        return documents
    return _ordered(documents, path)


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
    for key in ("dtype", "out_dtype"):
        if data.get(key) not in (None, *DTYPES):
            raise RecipeError(f"{where}: `{key}` is {data[key]!r}; evomerge writes {', '.join(DTYPES)}")
    document = Document(
        where=where,
        name=data.get("name"),
        spec=_method(data, where),
        base=reference(data["base_model"], f"{where}: `base_model`") if data.get("base_model") else None,
        models=(),
        parameters={},
        dtype=data.get("out_dtype") or data.get("dtype"),
        computed_in=data.get("dtype"),
        base_tokens=any(key in data for key in TOKENIZER),
    )
    document = replace(
        document, parameters=parameters(data.get("parameters"), document.known, f"{where}: `parameters`")
    )
    if data.get("slices") is None:
        return whole_models(document, data.get("models"))
    if data.get("models") is not None:
        raise RecipeError(
            f"{where}: it has `models` and `slices`, but merges one of the two; remove the other"
        )
    return sliced(document, data["slices"])


def _check_keys(data: Mapping[str, Any], where: str) -> None:
    for key, value in data.items():
        if key in UNSUPPORTED and value is not None:
            raise RecipeError(
                f"{where}: `{key}` is not supported yet; evomerge merges `models` or `slices`, with the "
                "base's tokenizer and chat template"
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
