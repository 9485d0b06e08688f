"""Items: one question of a task with its accepted answer, read from JSONL and rendered into a prompt.

A row of a task's file has `id` (unique in its task), `split`, `answer` and, for the choice scorer,
`choices`; every other field is free for the prompt template.

Imports: `evomerge.errors` and `evomerge.yamlfile`; never torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import jinja2.sandbox

from evomerge.errors import ConfigError, FitnessError
from evomerge.yamlfile import suggestion

Split = Literal["calibration", "selection", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)

_JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True
)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        task: name of its task.
        id: unique in its task.
        split: calibration, selection or held_out.
        prompt: the rendered template.
        answer: text, number, list of accepted answers, or an object for the json scorer.
        choices: the texts to choose from, empty where there are none.
        fields: the whole row of the file.
    """

    task: str
    id: str
    split: Split
    prompt: str
    answer: Any
    choices: tuple[str, ...]
    fields: Mapping[str, Any]


def check_split(name: object, where: str, error: type[ConfigError] | type[FitnessError]) -> Split:
    """`name` as a split; raises `error` with the nearest one otherwise."""
    for split in SPLITS:
        if name == split:
            return split
    raise error(f"{where}: unknown split {name!r}; {suggestion(str(name), SPLITS)}")


def compile_prompt(text: str, where: str) -> jinja2.Template:
    """The template of a prompt; `ConfigError` beginning with `where` when it is not jinja2."""
    try:
        return _JINJA.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"{where}: line {error.lineno} of the prompt is not jinja2 ({error.message}); correct it"
        ) from error


def read_items(
    path: Path, task: str, template: jinja2.Template, split: Split | None
) -> Iterator[tuple[str, Item]]:
    """`("file:line", item)` for each row of a JSONL file.

    Args:
        split: the split of every row of the file; None reads it from the rows.

    Raises:
        FitnessError: no such file, a line that is not a JSON object, a missing or wrong field.
    """
    for where, row in _rows(path, task):
        for key in ("id", "answer", *(() if split else ("split",))):
            if row.get(key) in (None, ""):
                raise FitnessError(f"{where}: the item has no `{key}`; add it to the line")
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise FitnessError(f"{where}: `id` is {row['id']!r}, but it must be text or a whole number")
        own = check_split(row.get("split", split), where, FitnessError)
        if split is not None and own != split:
            raise FitnessError(
                f"{where}: the item says split `{own}`, but its file is listed as `{split}`; move the item"
            )
        prompt = _render(template, row, where)
        yield where, Item(task, str(row["id"]), own, prompt, row["answer"], _choices(row, where), row)


def _rows(path: Path, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line, parse_constant=_refuse_constant)
                    if not isinstance(row, dict):
                        raise FitnessError(f"{path}:{number}: the line must hold one JSON object; correct it")
                    yield f"{path}:{number}", row
    except UnicodeDecodeError as error:
        raise FitnessError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise FitnessError(f"{path}:{number}: not JSON ({error}); each line must hold one object") from error
    except OSError as error:
        raise FitnessError(
            f"{path}: cannot be read ({error.strerror}); correct `data` of task `{task}`"
        ) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _choices(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    choices = row.get("choices")
    if choices is None:
        return ()
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or not 2 <= len(set(choices)) == len(choices):
        raise FitnessError(
            f"{where}: `choices` is {choices!r}, but it must be a list of two or more different texts"
        )
    return tuple(choices)


def _render(template: jinja2.Template, row: Mapping[str, Any], where: str) -> str:
    try:
        return template.render(row)
    except jinja2.UndefinedError as error:
        raise FitnessError(
            f"{where}: the prompt template asks for a field that the item has not got: {error.message}; "
            f"the item has: {', '.join(row)}"
        ) from error
    except Exception as error:  # a template is the user's code and may raise anything
        raise FitnessError(
            f"{where}: rendering the prompt failed: {type(error).__name__}: {error}"
        ) from error
