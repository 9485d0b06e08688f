"""How a search space divides the layers, as its YAML file says it.

Imports: `errors`, `yamlfile`; never torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evomerge.errors import ConfigError
from evomerge.yamlfile import Section


class Bounds(Section):
    """Closed interval of a parameter."""

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}, but low must be below high")
        return self


class Blocks(Section):
    """Equal blocks of layers."""

    blocks: Annotated[int, Field(ge=1)]


class Ranges(Section):
    """Explicit half-open ranges `[first, last)`; together they cover every layer once."""

    ranges: Annotated[list[tuple[int, int]], Field(min_length=1)]


class Smooth(Section):
    """Values at evenly spaced knots, interpolated linearly over depth."""

    smooth: Annotated[int, Field(ge=2)]


class LineBounds(Section):
    """What `lines` searches."""

    alpha: Bounds
    beta: Bounds


class Lines(Section):
    """LiNeS (Wang 2024, arXiv:2410.17146): layer l of L has `lambda` alpha + beta l/(L-1), the rest alpha.

    For every method that has `lambda`.
    """

    lines: LineBounds


Layers = Literal["all"] | Blocks | Ranges | Smooth | Lines


def layer_spans(layers: Layers, n: int, where: str) -> list[tuple[int, int]]:
    """Half-open layer ranges of the layer groups; one whole range for `smooth` and `lines`."""
    if n == 0 or layers == "all" or isinstance(layers, Smooth | Lines):
        return [(0, n)]
    if isinstance(layers, Blocks):
        count = layers.blocks
        if count > n:
            raise ConfigError(f"{where}: `layers.blocks` is {count}, but the model has {n} layers")
        return [(i * n // count, (i + 1) * n // count) for i in range(count)]
    spans = sorted(layers.ranges)
    edge = 0
    for first, last in spans:
        if first != edge or last <= first:
            raise ConfigError(
                f"{where}: `layers.ranges` has [{first}, {last}) where a range must begin at layer {edge}; "
                "ranges are half-open and cover every layer once"
            )
        edge = last
    if edge != n:
        raise ConfigError(f"{where}: `layers.ranges` ends at layer {edge}, but the model has {n} layers")
    return spans
