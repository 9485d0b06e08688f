"""`inspect_models`: base and models opened, measured in one pass, and what they say compared.

Imports: `evomerge.errors`, `evomerge.inspect`, `evomerge.sources`; torch only inside `inspect_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from evomerge.errors import ConfigError
from evomerge.inspect.differences import Differences, differences
from evomerge.inspect.places import place
from evomerge.inspect.sums import ModelSums, PairSums, S, total
from evomerge.recipe import Cell
from evomerge.sources.compatibility import problems
from evomerge.sources.layout import Layout
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet

# A hub id or folder as text, a folder as a path, or both parts of it written out.
Place = SourceRef | Path | str


@dataclass(frozen=True)
class Model:
    """One inspected model.

    Attributes:
        name: as in tables.
        kind: "model" (a full checkpoint) or "adapter".
        place: folder or hub id as the user wrote it.
        problem: why it cannot be merged into the base; None: it can.
        skipped: tensors left out of every number, with the reason.
        differences: from the base, in configuration and tokenizer.
        cells: sums per (layer, module).
    """

    name: str
    kind: str
    place: str
    problem: str | None
    skipped: Mapping[str, str]
    differences: Differences
    cells: Mapping[Cell, ModelSums]

    @property
    def total(self) -> ModelSums:
        """Sums over all cells."""
        return total(self.cells, ModelSums())


@dataclass(frozen=True)
class Kinship:
    """Means over all pairs of models in which the number is defined; None: in no pair."""

    pairs: int
    pcc: float | None
    cs: float | None
    ed: float | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_models` found.

    Attributes:
        base: folder or hub id of the base as the user wrote it.
        base_problem: what is wrong with the base itself; None: nothing.
        models: in the order given.
        pairs: (name, name) -> sums per (layer, module), over the tensors that both models have.
        cells: every cell of the base that a merge can change, in its order.
    """

    base: str
    base_problem: str | None
    models: tuple[Model, ...]
    pairs: Mapping[tuple[str, str], Mapping[Cell, PairSums]]
    cells: tuple[Cell, ...]

    @property
    def pair_totals(self) -> dict[tuple[str, str], PairSums]:
        """Sums over all cells by pair."""
        return {pair: total(cells, PairSums()) for pair, cells in self.pairs.items()}

    @property
    def kinship(self) -> Kinship | None:
        """Mean model kinship over all pairs; None for fewer than three models."""
        if len(self.models) < 3:
            return None
        rows = self.pair_totals.values()
        return Kinship(len(rows), *(_mean(getattr(row, key) for row in rows) for key in ("pcc", "cs", "ed")))


def inspect_models(
    base: Place,
    models: Mapping[str, Place],
    *,
    modules: Mapping[str, Iterable[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Task vectors of `models` and their likeness, from one pass over the tensors.

    Args:
        base: a full model: folder or hub id (`org/name@revision`).
        models: name -> full model or LoRA adapter for the base, one or more.
        modules: extra module patterns, as in a run file.
        progress: called with the number of tensors done and of all.

    Raises:
        ConfigError: no model is given, or a pattern is no regular expression.
        SourceError: a source is missing or cannot be read. One that can be read but does not fit the base is
            inspected as far as it goes.
    """
    from evomerge.inspect.statistics import measure

    if not models:
        raise ConfigError("no model is given; name at least one model to compare with the base")
    refs = {name: _reference(given, f"model `{name}`") for name, given in models.items()}
    sources = SourceSet.open(_reference(base, "base `base`"), refs, checked=False)
    reasons = problems(sources)
    layout = sources.layout(modules)
    measured = measure(sources, layout, progress)
    order = _cells(sources, layout)
    rows = tuple(
        Model(
            name,
            refs[name].key,
            refs[name].text,
            reasons.get(name),
            measured.skipped[name],
            differences(source.folder, sources.base.folder),
            _ordered(measured.models[name], order),
        )
        for name, source in sources.sources.items()
    )
    base_text = sources.refs[sources.base_name].text
    pairs = {pair: _ordered(cells, order) for pair, cells in measured.pairs.items()}
    return Inspection(base_text, reasons.get(sources.base_name), rows, pairs, order)


def _cells(sources: SourceSet, layout: Layout) -> tuple[Cell, ...]:
    """Cells with floating-point tensors: those outside the layers first, then layer by layer."""
    found = {layout.cell(name) for name in layout.tensors if sources.base.tensors[name].floating}
    return tuple(
        sorted(
            found,
            key=lambda cell: (-1 if cell.layer is None else cell.layer, layout.modules.index(cell.module)),
        )
    )


def _ordered(cells: Mapping[Cell, S], order: Iterable[Cell]) -> dict[Cell, S]:
    return {cell: cells[cell] for cell in order if cell in cells}


def _reference(given: Place, where: str) -> SourceRef:
    return given if isinstance(given, SourceRef) else place(str(given), where)


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None
