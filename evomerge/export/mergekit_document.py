"""One document of a mergekit file: its models, or its slices with theirs, and the setting of every tensor.

A slice is a document of its own for a range of layers: its sources are the models, and its parameters come
before the document's. Gradients run over the slice. A filter is compared with the name of the model's own
tensor for a parameter of a model, and with the name of the merged tensor for a shared one.

Imports: `merge.methods`, `export.mergekit_values`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evomerge.errors import RecipeError
from evomerge.export.mergekit_values import ModelRef, Parameters, parameters, reference, values
from evomerge.merge.methods import METHODS
from evomerge.merge.methods._gram import TASK_VECTORS
from evomerge.recipe import MethodSpec, Setting
from evomerge.yamlfile import suggestion

# methods that merge whole models, where the base is one of them
BASE_AS_INPUT = ("linear", "slerp", "karcher", "passthrough")
# of these, the ones that a slice can have without its base
BASE_OPTIONAL = ("linear", "karcher", "passthrough")


@dataclass(frozen=True)
class Document:
    """One merge.

    Attributes:
        where: begins the message of an error.
        name: under which other documents use the result; None for the one that is wanted.
        spec: the method.
        base: the base model, if the document names one.
        models: models and their own parameters, in order; never the base where the method merges
            differences from it. Empty for a document of slices.
        parameters: of the document, or of the slice and then of the document.
        slices: in the order of the merged model's layers; empty for whole models.
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
    slices: tuple[Slice, ...] = ()
    dtype: str | None = None
    computed_in: str | None = None
    base_tokens: bool = False

    @property
    def known(self) -> tuple[str, ...]:
        """Names of the method's parameters that a file can give."""
        return tuple(name for name in (*self.spec.per_model, *self.spec.shared) if name != TASK_VECTORS)

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """Every model that is read, the base first."""
        named = [ref for ref, _ in self.models] + [ref for part in self.slices for ref in part.document.refs]
        return tuple(dict.fromkeys([self.base, *named] if self.base else named))

    def setting(
        self,
        tensor: str,
        t: float,
        names: Mapping[ModelRef, str],
        inputs: Mapping[ModelRef, str] | None = None,
    ) -> Setting:
        """The complete setting of one tensor.

        Args:
            tensor: its name in the merged model.
            t: depth in [0, 1] at which gradients are taken.
            names: of the models, in the setting.
            inputs: name of the tensor in each model, None for `tensor`.

        Raises:
            RecipeError: a value is missing or out of its range.
        """
        inputs = inputs or {}
        models = {
            names[ref]: values(self.spec.per_model, (own, self.parameters), inputs.get(ref, tensor), t)
            for ref, own in self.models
        }
        shared = values(self.spec.shared, (self.parameters,), tensor, t)
        if TASK_VECTORS in self.spec.shared:
            shared[TASK_VECTORS] = self.base is not None
        where = f"{self.where}, tensor `{tensor}`"
        return self.spec.complete(Setting(self.spec.name, shared, models), where)


@dataclass(frozen=True)
class Slice:
    """Some layers of the merged model.

    Attributes:
        document: the slice as a merge of its own.
        first: number of the first layer that each model gives.
        count: of layers.
    """

    document: Document
    first: Mapping[ModelRef, int]
    count: int


def whole_models(document: Document, rows: Any) -> Document:
    """`document` with the models of its `models`.

    Raises:
        RecipeError: what is wrong with them.
    """
    where = f"{document.where}: `models"
    models = [_model(row, ("model",), document, where) for row, where in _listed(rows, where)]
    _named_once([ref for ref, _ in models], where)
    return replace(document, models=_inputs(document, models))


def sliced(document: Document, rows: Any) -> Document:
    """`document` with its `slices`.

    Raises:
        RecipeError: what is wrong with them.
    """
    slices = tuple(_slice(row, document, where) for row, where in _listed(rows, f"{document.where}: `slices"))
    first, last = len(slices[0].first), len(slices[-1].first)
    if first < last:
        raise RecipeError(
            f"{document.where}: the first of `slices` has {first} sources and the last {last}, where "
            "mergekit leaves sources out of the final norm and the head; give the first slice the others "
            "too, with a weight of 0"
        )
    if not sum(part.count for part in slices):
        raise RecipeError(f"{document.where}: `slices` have no layers; widen a `layer_range`")
    return replace(document, slices=slices)


def _slice(row: Any, document: Document, where: str) -> Slice:
    if not isinstance(row, dict) or "sources" not in row:
        raise RecipeError(f"{where} is {row!r}, but it must be a mapping with the key `sources`")
    _check_keys(row, ("sources", "base_model", "parameters"), where)
    base = reference(row["base_model"], f"{where}, `base_model`") if row.get("base_model") else document.base
    levels = parameters(row.get("parameters"), document.known, f"{where}: `parameters`"), document.parameters
    part = replace(
        document,
        where=where,
        base=base,
        # what no filter of the slice matches is looked up in the document
        parameters={
            key: tuple(row for level in levels for row in level.get(key, ())) for key in document.known
        },
    )
    models, ranges = [], {}
    for source, place in _listed(row["sources"], f"{where}, `sources"):
        models.append(_model(source, ("model", "layer_range"), part, place))
        ranges[models[-1][0]] = _range(source.get("layer_range"), place)
    _named_once([ref for ref, _ in models], f"{where}, `sources")
    lengths = {len(layers) for layers in ranges.values()}
    if len(lengths) > 1:
        shown = ", ".join(f"{len(layers)} of `{ref}`" for ref, layers in ranges.items())
        raise RecipeError(f"{where}: the sources of a slice need equally many layers, but it has {shown}")
    if base is not None and base not in ranges:
        if document.spec.name not in BASE_OPTIONAL:
            raise RecipeError(
                f"{where}: `base_model` `{base}` is not one of `sources`, and {document.spec.name} needs its "
                "layers; add it with a `layer_range`"
            )
        part = replace(part, base=None)
    first = {ref: layers.start for ref, layers in ranges.items()}
    return Slice(replace(part, models=_inputs(part, models)), first, lengths.pop())


def _range(data: Any, where: str) -> range:
    whole = isinstance(data, list) and len(data) == 2 and all(type(number) is int for number in data)
    if not whole or not 0 <= data[0] <= data[1]:
        raise RecipeError(
            f"{where}: `layer_range` is {data!r}, but it must be [first, end] with 0 <= first <= end; the "
            "end is not part of the slice"
        )
    return range(*data)


def _listed(rows: Any, where: str) -> list[tuple[Any, str]]:
    """The entries of a list and where each is; `where` ends with the list's name, its backquote open."""
    if not isinstance(rows, list) or not rows:
        raise RecipeError(f"{where}` is {rows!r}, but it must be a list with entries; add them")
    return [(row, f"{where}[{number}]`") for number, row in enumerate(rows)]


def _named_once(refs: Sequence[ModelRef], where: str) -> None:
    for number, ref in enumerate(refs):
        if ref in refs[:number]:
            raise RecipeError(f"{where}[{number}]` is `{ref}` again; name every model once")


def _check_keys(row: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in row:
        if key not in known:
            raise RecipeError(f"{where}: unknown key `{key}`; {suggestion(str(key), known)}")


def _model(row: Any, keys: Sequence[str], document: Document, where: str) -> tuple[ModelRef, Parameters]:
    """A model and its own parameters; `keys` are those beside `parameters`."""
    spec = document.spec
    if not isinstance(row, dict) or "model" not in row:
        raise RecipeError(f"{where} is {row!r}, but it must be a mapping with the key `model`")
    _check_keys(row, (*keys, "parameters"), where)
    own = row.get("parameters")
    for key in own if isinstance(own, dict) else ():
        if key in spec.shared:
            raise RecipeError(
                f"{where}: `{key}` holds for all models of {spec.name}; move it to the document's "
                "`parameters`"
            )
    return reference(row["model"], where), parameters(own, tuple(spec.per_model), where)


def _inputs(
    document: Document, models: Sequence[tuple[ModelRef, Parameters]]
) -> tuple[tuple[ModelRef, Parameters], ...]:
    """The models that take part, in mergekit's order and with mergekit's roles of the base."""
    spec, base, where = document.spec, document.base, document.where
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
        if "weight" in spec.per_model and "weight" not in document.parameters:
            raise RecipeError(
                f"{where}: `base_model` is not one of `models`, and linear averages it like the others; add "
                "it to `models` with a weight, or remove `base_model`"
            )
        return (*models, (base, {}))
    return tuple(models)
