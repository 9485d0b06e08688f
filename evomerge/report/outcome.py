"""What a run found, in words: the first line says whether the gain is significant; then one table.

Imports: `study.final`; never torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.evaluate.score import Estimate, Interval
from evomerge.study.final import Entry, Result

NOUNS = {"source": "source", "fixed": "fixed recipe"}


def headline(result: Result) -> str:
    """One sentence: what was gained, over the best source and the best fixed recipe, on held-out items."""
    winner = result.winner
    text = (
        f"{_verdict(result)}: `{winner.label}` scores {_value(winner.held_out)} on "
        f"{result.items['held_out']} held-out items"
    )
    differences = [
        f"to the best {_noun(result, entry)} (`{entry.label}`, {_value(entry.held_out)}) {_signed(lead)}"
        for entry, lead in result.rivals
    ]
    return f"{text}; difference {', '.join(differences)}." if differences else f"{text}."


def _verdict(result: Result) -> str:
    kind = result.winner.kind
    if kind == "base":
        return "No gain from merging, the base model won on the selection items"
    if kind == "source":
        return "No gain from merging, a source alone won on the selection items"
    gained = [_noun(result, entry) for entry, lead in result.rivals if lead.significant]
    missed = [_noun(result, entry) for entry, lead in result.rivals if not lead.significant]
    if kind == "fixed":
        return "No gain from the search, a fixed recipe won on the selection items"
    if missed or not gained:
        return f"Not significant over the best {' and the best '.join(missed or ['source'])}"
    return f"Significant gain over the best {' and the best '.join(gained)}"


def _noun(result: Result, entry: Entry) -> str:
    """`source`, or `other source` when the winner is a source itself; likewise for fixed recipes."""
    return ("other " if entry.kind == result.winner.kind else "") + NOUNS[entry.kind]


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every entry with its scores on the three splits and the winner's lead over it."""
    tasks = list(result.winner.tasks or {})
    header = ["recipe", "calibration", "selection", "held-out [95 %]", *tasks, "winner's lead [95 %]"]
    rows = []
    for entry in result.entries:
        scores = [f"{(entry.tasks or {})[task].mean:.3f}" for task in tasks]
        rows.append(
            [
                f"{entry.label} (winner)" if entry.lead is None else entry.label,
                "" if entry.calibration is None else f"{entry.calibration:.3f}",
                _value(entry.selection),
                _with_interval(entry.held_out),
                *scores,
                "" if entry.lead is None else _signed(entry.lead),
            ]
        )
    return header, rows


def short_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """`table` without the calibration and selection columns, for a terminal."""
    header, rows = table(result)
    return [header[0], *header[3:]], [[row[0], *row[3:]] for row in rows]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(result: Result, facts: Mapping[str, Any]) -> str:
    """The whole outcome: headline, table, how it was measured."""
    items = ", ".join(f"{count} {split.replace('_', '-')}" for split, count in result.items.items())
    method = (
        f"Items: {items}. Intervals: 95 %, bootstrap over items, paired for the winner's lead. The winner "
        "was chosen on the selection items; held-out items were scored once, after the search. The best "
        "source and the best fixed recipe are the best on the held-out items, which makes the comparison "
        "harder for the winner."
    )
    lines = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return "\n\n".join([headline(result), markdown_table(*table(result)), method, lines]) + "\n"


def as_json(result: Result) -> dict[str, Any]:
    """The outcome as plain data."""
    return {
        "headline": headline(result),
        "items": dict(result.items),
        "winner": result.winner.label,
        "significant": {entry.kind: bool(lead.significant) for entry, lead in result.rivals},
        "entries": [_entry_json(entry) for entry in result.entries],
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "label": entry.label,
        "kind": entry.kind,
        "recipe": entry.recipe.digest,
        "calibration": entry.calibration,
        "selection": entry.selection._asdict() if entry.selection else None,
        "held_out": entry.held_out._asdict() if entry.held_out else None,
        "tasks": {task: score._asdict() for task, score in (entry.tasks or {}).items()},
        "winners_lead": entry.lead._asdict() if entry.lead else None,
    }


def _value(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f}"


def _with_interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _signed(lead: Interval) -> str:
    return f"{lead.difference:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
