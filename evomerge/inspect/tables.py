"""An inspection as rows of text for a terminal and a page, and as one JSON document.

Imports: `evomerge.errors`, `evomerge.inspect`; never torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, cast, get_args

from evomerge.errors import ConfigError
from evomerge.inspect.inspection import Inspection, Model
from evomerge.inspect.sums import By, ModelSums, PairSums, grouped

Rows = tuple[list[str], list[list[str]]]  # header, rows
LISTED = 3  # skipped tensors and tokens that a line names before it only counts them
UNDEFINED = "-"
WIDEST = 60  # letters of a configuration value before it is cut

MODEL_HEADER = ["norm", "relative norm", "changed", "equal magnitudes"]
PAIR_HEADER = ["cosine", "pcc", "cs", "ed", "sign conflict"]

NOTES = {
    "norm": "L2 norm of the task vector, model - base in float32; an adapter's is that of its product, "
    "before any rounding to the base's dtype.",
    "relative norm": "The norm over that of the base's same tensors.",
    "changed": "Share of the entries where the task vector is not zero.",
    "equal magnitudes": "Of the non-zero entries, the share whose magnitude at least one other entry of the "
    "same tensor has, counted exactly. TIES trims by magnitude and must choose among equal ones.",
    "cosine": "Cosine of the two task vectors; near 0 for unrelated ones.",
    "pcc": "Pearson correlation of the two task vectors.",
    "cs": "Absolute cosine.",
    "ed": "Euclidean distance of the two task vectors.",
    "sign conflict": "Of the entries where both task vectors are not zero, the share with opposite signs; "
    "about 50 % for unrelated ones.",
}
KINSHIP = (
    "Model kinship is the likeness of two models' task vectors (pcc, cs or ed), and Hu et al. 2024 "
    "(arXiv:2410.12613) found that the more alike two models are, the less their merge gains, so that a pool "
    "of good models with a correlation near 1 has little left to gain."
)


def check_by(text: str | None) -> By | None:
    """`text` as a way to group; None stays None.

    Raises:
        ConfigError: it is no such way.
    """
    ways = [way for way in get_args(By) if way != "all"]
    if text is not None and text not in ways:
        raise ConfigError(f"--by is {text!r}; choose one of {', '.join(ways)}")
    return cast("By | None", text)


def model_table(inspection: Inspection) -> Rows:
    """One row per model."""
    rows = [
        [model.name, model.kind, *_model_cells(model.total), "no" if model.problem else "yes"]
        for model in inspection.models
    ]
    return ["model", "kind", *MODEL_HEADER, "mergeable"], rows


def pair_table(inspection: Inspection) -> Rows:
    """One row per pair of models."""
    rows = [[" / ".join(pair), *_pair_cells(sums)] for pair, sums in inspection.pair_totals.items()]
    return ["pair", *PAIR_HEADER], rows


def long_model_table(inspection: Inspection, by: By) -> Rows:
    """One row per model and layer, module or cell."""
    rows = [
        [model.name, label, *_model_cells(sums)]
        for model in inspection.models
        for label, sums in grouped(model.cells, by).items()
    ]
    return ["model", by, *MODEL_HEADER], rows


def long_pair_table(inspection: Inspection, by: By) -> Rows:
    """One row per pair and layer, module or cell."""
    rows = [
        [" / ".join(pair), label, *_pair_cells(sums)]
        for pair, cells in inspection.pairs.items()
        for label, sums in grouped(cells, by).items()
    ]
    return ["pair", by, *PAIR_HEADER], rows


def difference_table(inspection: Inspection) -> Rows:
    """One row per configuration key that differs and per kind of difference of the tokenizers."""
    rows = []
    for model in inspection.models:
        for row in model.differences.keys:
            values = [_short(row[side]) if side in row else "absent" for side in ("base", "model")]
            rows.append([model.name, row["file"], row["key"], *values])
        rows += [[model.name, "tokenizer", *words] for words in _token_rows(model)]
    return ["model", "where", "what", "base", "model's"], rows


def difference_line(inspection: Inspection) -> str | None:
    """What to say in place of an empty `difference_table`; None when it has rows."""
    if difference_table(inspection)[1]:
        return None
    files = dict.fromkeys(file for model in inspection.models for file in model.differences.files)
    if not files:
        return "No model brings a configuration or a tokenizer of its own."
    return f"No difference from the base in {', '.join(files)}."


def problem_lines(inspection: Inspection) -> list[str]:
    """Why a source cannot be merged, and which tensors were left out."""
    lines = []
    if inspection.base_problem:
        lines.append(f"base cannot be merged: {inspection.base_problem}")
    for model in inspection.models:
        if model.problem:
            lines.append(f"{model.name} cannot be merged: {model.problem}")
        if model.skipped:
            some = [f"`{name}` {reason}" for name, reason in model.skipped.items()]
            lines.append(
                f"{model.name}: {len(some)} tensor{'s' * (len(some) > 1)} left out of its numbers: "
                f"{_listed(some, '; ')}"
            )
    return lines


def kinship_line(inspection: Inspection) -> str | None:
    """Mean kinship with what it means; None for fewer than three models."""
    mean = inspection.kinship
    if mean is None:
        return None
    return (
        f"Mean kinship over {mean.pairs} pairs: pcc {_number(mean.pcc, '+.4f')}, "
        f"cs {_number(mean.cs, '.4f')}, ed {_number(mean.ed, '.4g')}. {KINSHIP}"
    )


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Everything, as plain data; a number that is undefined is null."""
    mean = inspection.kinship
    return {
        "base": {"place": inspection.base, "problem": inspection.base_problem},
        "models": [
            {
                "name": model.name,
                "kind": model.kind,
                "place": model.place,
                "problem": model.problem,
                "skipped": [{"tensor": name, "reason": reason} for name, reason in model.skipped.items()],
                **model.differences.as_json(),
                "all": model.total.as_json(),
                **{f"by_{by}": _groups(grouped(model.cells, by)) for by in ("layer", "module", "cell")},
            }
            for model in inspection.models
        ],
        "pairs": [
            {
                "models": list(pair),
                "all": inspection.pair_totals[pair].as_json(),
                **{f"by_{by}": _groups(grouped(cells, by)) for by in ("layer", "module", "cell")},
            }
            for pair, cells in inspection.pairs.items()
        ],
        "kinship": None
        if mean is None
        else {"pairs": mean.pairs, "pcc": mean.pcc, "cs": mean.cs, "ed": mean.ed, "meaning": KINSHIP},
        "notes": NOTES,
    }


def percent(value: float | None) -> str:
    """A share with three significant digits; `UNDEFINED` for None."""
    return UNDEFINED if value is None else f"{100 * value:#.3g}".rstrip(".") + " %"


def _groups(groups: dict[str, ModelSums] | dict[str, PairSums]) -> dict[str, Any]:
    return {label: sums.as_json() for label, sums in groups.items()}


def _model_cells(sums: ModelSums) -> list[str]:
    return [
        _number(sums.norm, ".4g"),
        *map(percent, (sums.relative_norm, sums.changed_share, sums.tied_share)),
    ]


def _pair_cells(sums: PairSums) -> list[str]:
    return [
        _number(sums.cosine, "+.4f"),
        _number(sums.pcc, "+.4f"),
        _number(sums.cs, ".4f"),
        _number(sums.ed, ".4g"),
        percent(sums.sign_conflict),
    ]


def _token_rows(model: Model) -> Iterable[list[str]]:
    found = model.differences
    if found.sentencepiece:
        yield ["tokenizer.model is another file", "", ""]
    for word, tokens in (("added", found.added), ("missing", found.removed)):
        if tokens:
            listed = _listed([f"{token} ({number})" for token, number in tokens.items()])
            sides = ["", listed] if word == "added" else [listed, ""]
            yield [f"{len(tokens)} token{'s' * (len(tokens) > 1)} {word}", *sides]
    if found.moved:
        sides = [_listed([f"{t} ({ids[side]})" for t, ids in found.moved.items()]) for side in (0, 1)]
        yield [f"{len(found.moved)} token{'s' * (len(found.moved) > 1)} with another id", *sides]


def _listed(words: Sequence[str], separator: str = ", ") -> str:
    more = len(words) - LISTED
    return separator.join(words[:LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _number(value: float | None, form: str) -> str:
    return UNDEFINED if value is None else format(value, form)
