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
    """One sentence: significant or not, over the best source and over the best fixed recipe."""
    winner = result.winner
    rivals = [(NOUNS[entry.kind], entry, lead) for entry, lead in result.rivals]
    if winner.kind != "search":
        start = (
            f"No gain from the search: on fresh items the fixed recipe `{winner.label}` was chosen itself"
            if winner.kind == "fixed"
            else f"No gain from merging: on fresh items `{winner.label}` alone was chosen"
        )
    elif rivals and all(lead.significant for _, _, lead in rivals):
        start = f"Significant gain: `{winner.label}`"
    else:
        weak = [what for what, _, lead in rivals if not lead.significant]
        start = f"Not significant over the best {' and the best '.join(weak)}: `{winner.label}`"
    parts = [
        f"{_signed(lead)} over the best {what} (`{entry.label}`, {_value(entry.held_out)})"
        for what, entry, lead in rivals
    ]
    scored = f"scores {_value(winner.held_out)} on {result.items['held_out']} held-out items"
    return f"{start} {scored}; {'; '.join(parts)}." if parts else f"{start} {scored}."


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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(result: Result, facts: Mapping[str, Any]) -> str:
    """The whole outcome: headline, table, how it was measured."""
    items = ", ".join(f"{count} {split.replace('_', '-')}" for split, count in result.items.items())
    return (
        "\n\n".join(
            [
                headline(result),
                markdown_table(*table(result)),
                f"Items: {items}. Intervals: 95 %, bootstrap over items, paired for the winner's lead. The winner "
                "was chosen on the selection items; held-out items were scored once, after the search. The best "
                "source and the best fixed recipe are the best on the held-out items, which makes the comparison "
                "harder for the winner.",
                "\n".join(f"- {key}: {value}" for key, value in facts.items()),
            ]
        )
        + "\n"
    )


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
