"""Which tensors a mergekit document makes, and of which tensors of its models.

Slices are laid one after the other: layers are numbered anew, what comes before the layers (embeddings) is
made of the first slice's models, what comes after (final norm, head) of the last slice's. As in mergekit
0.1.5, a gradient runs over the slice, from t = 0 at its first layer to 1 at its last; a slice of one layer
has t = 1, and tensors outside the layers have t = 0.

Imports: `evomerge.errors`, `sources`, `export.mergekit_document`; never torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from evomerge.errors import CompatibilityError, RecipeError
from evomerge.export.mergekit_document import Document, Slice
from evomerge.export.mergekit_values import ModelRef
from evomerge.sources.layout import LAYER, Layout
from evomerge.sources.renamed import Origin
from evomerge.sources.source_set import SourceSet
from evomerge.sources.tying import head_of, is_tied, mergeable

# what a model reads before its first layer; LFM2 calls its final norm `embedding_norm`
BEFORE = re.compile(r"embed(?!ding_norm|_out)|(?:^|\.)w[tp]e\.|project_in")


class Output(NamedTuple):
    """One tensor of the merged model.

    Attributes:
        name: its name there.
        document: whose models and parameters make it: a whole document or one of a slice.
        t: depth in [0, 1] at which gradients are taken.
        tensors: model -> name of its tensor.
        in_slice: whether `document` is a slice, whose tensors have a base of their own.
    """

    name: str
    document: Document
    t: float
    tensors: Mapping[ModelRef, str]
    in_slice: bool

    def origin(self, names: Mapping[ModelRef, str]) -> Origin:
        """Where the tensor comes from; `names` are the models' names in the sources."""
        tensors = {names[ref]: tensor for ref, tensor in self.tensors.items()}
        return Origin(names[self.document.refs[0]], tensors)


def whole_outputs(document: Document, sources: SourceSet) -> list[Output]:
    """The tensors of a document of whole models."""
    layout = sources.layout()
    layers = {tensor: layout.cell(tensor).layer for tensor in layout.tensors}
    depths = {t: 0.0 if layer is None else _depth(layer, layout.n_layers) for t, layer in layers.items()}
    return [Output(t, document, depth, dict.fromkeys(document.refs, t), False) for t, depth in depths.items()]


def sliced_outputs(document: Document, sources: SourceSet, names: Mapping[ModelRef, str]) -> list[Output]:
    """The tensors of a document of slices.

    Raises:
        RecipeError: a layer range exceeds its model, or a model has no single stack of layers.
        CompatibilityError: tensors that are to be merged, or to form one model, differ in name or shape.
    """
    stacks = {ref: Stack.of(sources, names[ref], document.where) for ref in document.refs}
    donor = stacks[document.refs[0]]
    _check_fit(stacks, donor)
    first, last = document.slices[0], document.slices[-1]
    outputs = [_outside(first, name) for name in stacks[first.document.refs[0]].before]
    number = 0
    for part in document.slices:
        outputs += _layers(part, stacks, number)
        number += part.count
    outputs += [_outside(last, name) for name in stacks[last.document.refs[0]].after]
    _check_shapes(outputs, stacks, donor)
    return outputs


def layer_sources(document: Document, names: Mapping[ModelRef, str]) -> list[tuple[str, int]]:
    """For every layer of a sliced model: the base of its slice, and the number of the layer there."""
    return [
        (names[part.document.refs[0]], part.first[part.document.refs[0]] + index)
        for part in document.slices
        for index in range(part.count)
    ]


@dataclass
class Stack:
    """The tensors of a model with one stack of layers.

    Attributes:
        where: the file and the model, for messages.
        head: what is before the number in the name of a layer's tensor.
        shapes: of all tensors.
        layers: number -> tail (what is after the number in the name) of its tensors, in their order.
        before, after: the tensors outside the layers.
    """

    where: str
    head: str = ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: dict[int, list[str]] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, sources: SourceSet, name: str, where: str) -> Stack:
        """The stack of the source `name`.

        Raises:
            RecipeError: the model has other towers, or several stacks of layers.
        """
        checkpoint = sources.checkpoint(name)
        tied = head_of(checkpoint.tensors) if is_tied(sources.base) else None
        layout = Layout(tensor for tensor in mergeable(checkpoint) if tensor != tied)
        stack = cls(
            f"{where}: model `{name}`",
            shapes={name: checkpoint.tensors[name].shape for name in layout.tensors},
        )
        for tensor in layout.tensors:
            match = LAYER.search(tensor)
            if match is None:
                (stack.before if BEFORE.search(tensor) else stack.after).append(tensor)
                continue
            head, tail = tensor[: match.start(1)], tensor[match.end(1) :]
            if layout.cell(tensor).module == "tower" or (stack.layers and head != stack.head):
                raise RecipeError(
                    f"{stack.where} has `{tensor}`: `slices` are for models with one stack of layers and no "
                    "other towers; merge it as one of `models`"
                )
            stack.head = head
            stack.layers.setdefault(int(match.group(1)), []).append(tail)
        return stack


def _outside(part: Slice, name: str) -> Output:
    return Output(name, part.document, 0.0, dict.fromkeys(part.first, name), True)


def _layers(part: Slice, stacks: Mapping[ModelRef, Stack], number: int) -> Iterator[Output]:
    """The layers of a slice, numbered from `number` on."""
    for ref, first in part.first.items():
        depth = len(stacks[ref].layers)
        if first + part.count > depth:
            raise RecipeError(
                f"{part.document.where}: `layer_range` of `{ref}` ends at {first + part.count}, but the "
                f"model has {depth} layers; lower the end"
            )
    root = part.document.refs[0]
    for index in range(part.count):
        tails = stacks[root].layers[part.first[root] + index]
        for ref, first in part.first.items():
            only = set(tails) ^ set(stacks[ref].layers[first + index])
            if only:
                raise CompatibilityError(
                    f"{part.document.where}: layer {first + index} of `{ref}` and layer "
                    f"{part.first[root] + index} of `{root}` differ in `{min(only)}`, which only one of them "
                    "has; use other layers"
                )
        for tail in tails:
            tensors = {ref: f"{stacks[ref].head}{first + index}{tail}" for ref, first in part.first.items()}
            name = f"{stacks[root].head}{number + index}{tail}"
            yield Output(name, part.document, _depth(index, part.count), tensors, True)


def _depth(index: int, count: int) -> float:
    """Place of a layer among `count`, from 0 to 1; 1 for the only one, as in mergekit."""
    return index / (count - 1) if count > 1 else 1.0


def _check_fit(stacks: Mapping[ModelRef, Stack], donor: Stack) -> None:
    """The tensors around the layers must be those of `donor`, whose config.json the merged model gets."""
    for stack in stacks.values():
        only = {*stack.before, *stack.after} ^ {*donor.before, *donor.after}
        if only:
            raise CompatibilityError(
                f"{stack.where} and {donor.where} differ in `{min(only)}`, which only one of them has; use "
                "models of one layout"
            )


def _check_shapes(outputs: Sequence[Output], stacks: Mapping[ModelRef, Stack], donor: Stack) -> None:
    """Tensors that become one must have one shape, and those of one model its shapes."""
    known: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in donor.shapes.items():
        known.setdefault(_without_number(name), set()).add(shape)
    for output in outputs:
        root = output.document.refs[0]
        wanted = stacks[root].shapes[output.tensors[root]]
        for ref, tensor in output.tensors.items():
            shape = stacks[ref].shapes[tensor]
            if shape != wanted or shape not in known.get(_without_number(tensor), ()):
                raise CompatibilityError(
                    f"{output.document.where}: `{tensor}` of model `{ref}` has shape {shape}, which is not "
                    f"that of `{output.tensors[root]}` of `{root}` or not one of {donor.where}; use models "
                    "of one layout, or other layers"
                )


def _without_number(name: str) -> str:
    match = LAYER.search(name)
    return name if match is None else name[: match.start(1)] + name[match.end(1) :]
