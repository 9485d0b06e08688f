"""Layer x module grids: which square has which colour, and what the colours mean.

A colour is one of `STEPS` classes: `s0` (nothing) to `s20` (much) of a sequential scale, `d0` (opposed) over
`d10` (neutral) to `d20` (agreeing) of a diverging one; `none` where a number is undefined. The page's style
sheet gives each class a colour per light and dark mode.

Imports: `evomerge.recipe`; never torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.recipe import Cell

STEPS = 21  # odd, so that a diverging scale has a middle
HIGH_QUANTILE = 0.98  # the sequential scale ends here, so that one cell far out does not pale all others
WIDTH, ROW, GAP, GUTTER = 290, 19, 1, 70  # pixels: all columns, a row, between squares, labels
WIDEST_SQUARE, NARROWEST_SQUARE = 19.0, 2.0

Color = tuple[int, int, int]
# Stops from class 0 to the last, for light and dark mode. Diverging: orange opposed, blue agreeing, which
# people who do not tell red from green tell apart.
STOPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "light": {
        "s": ("#eef1f6", "#b9d6e8", "#5aa5cd", "#1f6aa5", "#0a2f5c"),
        "d": ("#9a3a06", "#e58a4e", "#f2f1ef", "#6ba6d6", "#134a8a"),
    },
    "dark": {
        "s": ("#222936", "#1f4a70", "#2b7ab0", "#6ab7e3", "#e3f4ff"),
        "d": ("#ffb07c", "#b8571f", "#2a303c", "#2c6fb0", "#9cd0ff"),
    },
}


@dataclass(frozen=True)
class Scale:
    """Number -> colour class, linear between `low` and `high`, with what lies beyond cut off.

    Attributes:
        kind: "s" (sequential, from `low`) or "d" (diverging, from opposed to agreeing).
        low, high: numbers at the first and the last class; `low` may be the larger one.
        form: a number as text, for the legend.
        beyond: whether some squares lie above `high`.
    """

    kind: str
    low: float
    high: float
    form: Callable[[float], str]
    beyond: bool = False

    def css(self, value: float | None) -> str:
        """Class of `value`."""
        if value is None:
            return "none"
        at = (value - self.low) / (self.high - self.low)
        return f"{self.kind}{round(max(0.0, min(1.0, at)) * (STEPS - 1))}"

    @property
    def ticks(self) -> list[str]:
        """Texts under the first, the middle and the last class of the legend."""
        low, middle, high = map(self.form, (self.low, (self.low + self.high) / 2, self.high))
        return [low, middle, f"≥ {high}" if self.beyond else high]

    @property
    def classes(self) -> list[str]:
        """All classes, first to last."""
        return [f"{self.kind}{step}" for step in range(STEPS)]


def sequential(values: Iterable[float | None], form: Callable[[float], str]) -> Scale:
    """From 0 to about the largest of `values`, zeros not counted."""
    found = sorted(value for value in values if value)
    end = found[int(HIGH_QUANTILE * (len(found) - 1))] if found else 1.0
    high = round_up(end)
    return Scale("s", 0.0, high, form, beyond=bool(found) and found[-1] > high)


def diverging(
    values: Iterable[float | None],
    middle: float,
    form: Callable[[float], str],
    *,
    least: float,
    smaller_agrees: bool = False,
) -> Scale:
    """Around `middle`, as far on both sides as the farthest of `values`, and at least `least`.

    `least` keeps differences that say nothing from being painted in full colour.
    """
    reach = round_up(max([least, *(abs(value - middle) for value in values if value is not None)]))
    sign = -1 if smaller_agrees else 1
    return Scale("d", middle - sign * reach, middle + sign * reach, form)


def round_up(value: float) -> float:
    """The next number at or above `value` > 0 with a short decimal form."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(step * power for step in steps if step * power >= value * (1 - 1e-9))


@dataclass(frozen=True)
class Square:
    """One cell of a grid: upper left corner in pixels, class, and what it says under the pointer."""

    x: float
    y: float
    css: str
    text: str


@dataclass(frozen=True)
class Grid:
    """A heat map: modules downwards, layers to the right; the column before layer 0 is outside the layers.

    Attributes:
        title: what is shown.
        width, height, square: pixels of the whole and of a square's width.
        rows: (y of the middle, module).
        columns: (x of the middle, text) of the layers that are labelled.
        squares: in reading order.
    """

    title: str
    width: float
    height: float
    square: float
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str]]
    squares: list[Square]


def grid(
    title: str,
    cells: Sequence[Cell],
    values: Mapping[Cell, float | None],
    scale: Scale,
    text: Callable[[Cell], str],
) -> Grid:
    """Lay out `cells`; one without a value is drawn as undefined."""
    modules = list(dict.fromkeys(cell.module for cell in cells))
    layers = sorted({cell.layer for cell in cells if cell.layer is not None})
    places: list[int | None] = [*([None] if any(cell.layer is None for cell in cells) else []), *layers]
    square = max(NARROWEST_SQUARE, min(WIDEST_SQUARE, WIDTH / max(1, len(places)) - GAP))
    x = {layer: GUTTER + at * (square + GAP) for at, layer in enumerate(places)}
    y = {module: at * (ROW + GAP) for at, module in enumerate(modules)}
    squares = [
        Square(x[cell.layer], y[cell.module], scale.css(values.get(cell)), text(cell)) for cell in cells
    ]
    apart = next(step for step in (1, 2, 5, 10, 20, 50, 10_000) if step * (square + GAP) >= 24)
    labelled = [layer for layer in places if layer is not None and layer % apart == 0]
    return Grid(
        title,
        GUTTER + len(places) * (square + GAP),
        len(modules) * (ROW + GAP) + 14,
        square,
        [(y[module] + ROW / 2, module) for module in modules],
        [(x[layer] + square / 2, str(layer)) for layer in labelled],
        squares,
    )


def palette(mode: str) -> dict[str, str]:
    """Colour class -> `#rrggbb` in mode "light" or "dark"."""
    return {
        f"{kind}{step}": _mixed(stops, step / (STEPS - 1))
        for kind, stops in STOPS[mode].items()
        for step in range(STEPS)
    }


def _mixed(stops: Sequence[str], at: float) -> str:
    """Colour at `at` in [0, 1] of evenly spaced stops."""
    place = at * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    pairs = zip(_rgb(stops[left]), _rgb(stops[left + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - left)):02x}" for a, b in pairs)


def _rgb(color: str) -> Color:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue
