"""An inspection as one HTML page that needs no network: tables, heat maps, and what the numbers are.

Imports: `evomerge.errors`, `evomerge.inspect`, jinja2; never torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from evomerge import __version__
from evomerge.errors import ConfigError
from evomerge.inspect import heatmap, tables
from evomerge.inspect.heatmap import Grid, Scale
from evomerge.inspect.inspection import Inspection, Model
from evomerge.inspect.sums import PairSums
from evomerge.inspect.tables import percent
from evomerge.recipe import Cell

TEMPLATE = Path(__file__).with_name("page.html")
LEAST_COSINE, LEAST_CONFLICT = 0.05, 0.02  # half-ranges; about equal: conflict = acos(cosine) / pi


@dataclass(frozen=True)
class Maps:
    """Heat maps of one number, on one scale."""

    title: str
    note: str
    scale: Scale
    grids: list[Grid]


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page to `path`.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(page(inspection), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --html") from error


def page(inspection: Inspection) -> str:
    """The page's text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    cells, unchanged = _shown(inspection)
    return template.render(
        version=__version__,
        base=inspection.base,
        models=inspection.models,
        tables=[
            ("Models", tables.model_table(inspection)),
            *([("Pairs", tables.pair_table(inspection))] if inspection.pairs else []),
        ],
        kinship=tables.kinship_line(inspection),
        problems=tables.problem_lines(inspection),
        differences=tables.difference_table(inspection),
        no_difference=tables.difference_line(inspection),
        notes=tables.NOTES,
        maps=_maps(inspection, cells) if cells else [],
        unchanged=unchanged,
        row=heatmap.ROW,
        palettes={mode: heatmap.palette(mode) for mode in heatmap.STOPS},
    )


def _shown(inspection: Inspection) -> tuple[list[Cell], list[str]]:
    """Cells of the modules worth drawing, and the names of those that every model leaves as they are."""
    drawn = {
        cell.module
        for cell in inspection.cells
        for model in inspection.models
        if cell not in model.cells or model.cells[cell].changed
    }
    others = {cell.module: None for cell in inspection.cells if cell.module not in drawn}
    return [cell for cell in inspection.cells if cell.module in drawn], list(others)


def _maps(inspection: Inspection, cells: list[Cell]) -> list[Maps]:
    norms = {
        model.name: {cell: sums.relative_norm if sums.changed else None for cell, sums in model.cells.items()}
        for model in inspection.models
    }
    scale = heatmap.sequential(_values(norms), _short_percent)
    grids = [
        heatmap.grid(model.name, cells, norms[model.name], scale, _model_text(model))
        for model in inspection.models
    ]
    maps = [Maps("Relative norm", "how far each model moved from the base", scale, grids)]
    if not inspection.pairs:
        return maps
    cosines = _of_pairs(inspection, lambda sums: sums.cosine)
    conflicts = _of_pairs(inspection, lambda sums: sums.sign_conflict)
    for title, note, numbers, scale in (
        (
            "Cosine",
            "blue: the models pull the same way; orange: against each other",
            cosines,
            heatmap.diverging(_values(cosines), 0.0, _signed, least=LEAST_COSINE),
        ),
        (
            "Sign conflict",
            "blue: fewer opposite signs than the 50 % of unrelated models; orange: more",
            conflicts,
            heatmap.diverging(
                _values(conflicts), 0.5, _short_percent, least=LEAST_CONFLICT, smaller_agrees=True
            ),
        ),
    ):
        grids = [
            heatmap.grid(name, cells, numbers[name], scale, _pair_text(inspection.pairs[pair]))
            for name, pair in zip(numbers, inspection.pairs, strict=True)
        ]
        maps.append(Maps(title, note, scale, grids))
    return maps


def _of_pairs(
    inspection: Inspection, number: Callable[[PairSums], float | None]
) -> dict[str, dict[Cell, float | None]]:
    return {
        " / ".join(pair): {cell: number(sums) for cell, sums in cells.items()}
        for pair, cells in inspection.pairs.items()
    }


def _values(numbers: Mapping[str, Mapping[Cell, float | None]]) -> Iterable[float | None]:
    return [value for row in numbers.values() for value in row.values()]


def _model_text(model: Model) -> Callable[[Cell], str]:
    def text(cell: Cell) -> str:
        sums = model.cells.get(cell)
        if sums is None:
            return f"{_where(cell)}\nnot compared"
        if not sums.changed:
            return f"{_where(cell)}\nunchanged"
        return (
            f"{_where(cell)}\nnorm {sums.norm:.4g}, relative {percent(sums.relative_norm)}\n"
            f"changed {percent(sums.changed_share)}, equal magnitudes {percent(sums.tied_share)}"
        )

    return text


def _pair_text(cells: Mapping[Cell, PairSums]) -> Callable[[Cell], str]:
    def text(cell: Cell) -> str:
        sums = cells.get(cell)
        if sums is None:
            return f"{_where(cell)}\nnot compared"
        if sums.cosine is None:
            return f"{_where(cell)}\nunchanged in at least one of the two"
        return (
            f"{_where(cell)}\ncosine {sums.cosine:+.4f}, distance {sums.ed:.4g}\n"
            f"sign conflict {percent(sums.sign_conflict)} of {sums.both:,} entries"
        )

    return text


def _short_percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"


def _where(cell: Cell) -> str:
    return cell.module if cell.layer is None else f"layer {cell.layer}, {cell.module}"
