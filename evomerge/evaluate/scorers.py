"""Scorers: callables of two arguments, what the engine answered and the item, that return one number.

Larger is better. Every value lies in [0, 1], but for `nll`, whose value is negative bits per byte. A
scorer reads either a completion or the log-likelihoods of continuations: `GenerationScorer`,
`LikelihoodScorer`. Options are pydantic fields; `SCORERS` is the table of names, and the shared test of
the table runs on every entry.

Imports: `evomerge.errors`, `evomerge.yamlfile`, `engine.base`, `evaluate.extract`, `evaluate.items`; never
torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from evomerge.engine.base import Likelihood
from evomerge.errors import ConfigError, FitnessError
from evomerge.evaluate.extract import first_object, numbers, same_json
from evomerge.evaluate.items import Item
from evomerge.yamlfile import Key, Section, dotted, suggestion, validate


class Scorer(Section):
    """Options of a scorer; see the two kinds below."""

    needs: ClassVar[Literal["generation", "likelihood"]]

    def check(self, item: Item) -> None:
        """Raise `ValueError` when `item` cannot be scored: called for every item before a run starts."""
        accepted(item.answer)

    def identity(self) -> Mapping[str, Any]:
        """What of this scorer influences scores, as JSON: part of the suite's digest."""
        return self.model_dump(mode="json")


class GenerationScorer(Scorer):
    """Scores the text of one completion."""

    needs = "generation"

    @abstractmethod
    def __call__(self, completion: str, item: Item) -> float:
        """Value of `completion` for `item`, in [0, 1]."""


class LikelihoodScorer(Scorer):
    """Scores the log-likelihoods of `references(item)`, in their order.

    Attributes:
        prefix: text between the prompt and a reference; None is one space, or nothing when the task is a
            chat or the prompt ends in white space.
    """

    needs = "likelihood"
    prefix: str | None = None

    @abstractmethod
    def references(self, item: Item) -> tuple[str, ...]:
        """The texts whose likelihood is wanted."""

    @abstractmethod
    def __call__(self, likelihoods: Sequence[Likelihood], item: Item) -> float:
        """Value of `likelihoods`, one for each reference."""


def accepted(answer: Any) -> tuple[str, ...]:
    """The accepted answers as text, numbers as JSON writes them; `ValueError` for none or an object."""
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or any(isinstance(one, dict | list) or one in (None, "") for one in answers):
        raise ValueError(f"`answer` is {answer!r}, but it must be text, a number or a list of these")
    return tuple(one if isinstance(one, str) else json.dumps(one) for one in answers)


class Exact(GenerationScorer):
    """1 when the completion is an accepted answer, white space around both ignored.

    Attributes:
        ignore_case: compare case-folded.
        strip_period: ignore one full stop at the end.
    """

    ignore_case: bool = False
    strip_period: bool = False

    def __call__(self, completion: str, item: Item) -> float:
        """1.0 or 0.0."""
        return float(self._normal(completion) in {self._normal(answer) for answer in accepted(item.answer)})

    def _normal(self, text: str) -> str:
        text = text.strip()
        text = text.removesuffix(".").rstrip() if self.strip_period else text
        return text.casefold() if self.ignore_case else text


class Contains(GenerationScorer):
    """1 when an accepted answer occurs in the completion, as characters: "4" occurs in "42".

    Attributes:
        ignore_case: compare case-folded.
    """

    ignore_case: bool = False

    def __call__(self, completion: str, item: Item) -> float:
        """1.0 or 0.0."""
        answers = accepted(item.answer)
        if self.ignore_case:
            completion, answers = completion.casefold(), tuple(answer.casefold() for answer in answers)
        return float(any(answer in completion for answer in answers))


class Numeric(GenerationScorer):
    """1 when the first (or last) number in the completion equals the answer's number.

    Attributes:
        which: which number of the completion is the answer.
        tolerance: largest absolute difference that still counts as equal.
    """

    which: Literal["first", "last"] = "first"
    tolerance: float = Field(0.0, ge=0)

    def check(self, item: Item) -> None:
        """Every accepted answer must hold exactly one number."""
        for answer in accepted(item.answer):
            count = len(list(numbers(answer)))
            if count != 1:
                raise ValueError(f"`answer` is {answer!r}, which holds {count} numbers, but it must hold one")

    def __call__(self, completion: str, item: Item) -> float:
        """1.0 or 0.0; a completion without a number has 0.0."""
        found = list(numbers(completion))
        if not found:
            return 0.0
        number, tolerance = found[0 if self.which == "first" else -1], Decimal(repr(self.tolerance))
        wanted = [next(numbers(answer)) for answer in accepted(item.answer)]
        return float(any(number == one or abs(number - one) <= tolerance for one in wanted))


class Regex(GenerationScorer):
    """1 when the first match of `pattern` captures an accepted answer, or, without a group, when it matches.

    Attributes:
        pattern: a Python regular expression with at most one group, searched in the completion.
        ignore_case: for the pattern and for the comparison with the answer.
    """

    pattern: str
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error
        if groups > 1:
            raise ValueError(f"{pattern!r} has {groups} groups, but it may have one; write others as (?:...)")
        return pattern

    def __call__(self, completion: str, item: Item) -> float:
        """1.0 or 0.0."""
        match = re.search(self.pattern, completion, re.IGNORECASE if self.ignore_case else 0)
        if match is None or not match.re.groups:
            return float(match is not None)
        return Exact(ignore_case=self.ignore_case)(match[1] or "", item)


class Json(GenerationScorer):
    """1 when the first JSON object in the completion equals the answer, key order and 1 against 1.0 aside.

    Attributes:
        partial: give the number of right keys over the number of keys in either object, so that an
            invented key costs as much as a missing one.
    """

    partial: bool = False

    def check(self, item: Item) -> None:
        """The answer is an object, text that holds one, or a list of these."""
        if not all(isinstance(answer, dict) and answer for answer in _objects(item.answer)):
            raise ValueError(f"`answer` is {item.answer!r}, but it must be a JSON object with a key or more")

    def __call__(self, completion: str, item: Item) -> float:
        """1.0, 0.0 or, with `partial`, a share; a completion without an object has 0.0."""
        found = first_object(completion)
        if found is None:
            return 0.0
        return max(self._value(found, answer) for answer in _objects(item.answer))

    def _value(self, found: Mapping[str, Any], answer: Mapping[str, Any]) -> float:
        right = sum(key in found and same_json(found[key], value) for key, value in answer.items())
        share = right / len(found.keys() | answer.keys())
        return share if self.partial else float(share == 1)


def _objects(answer: Any) -> list[Any]:
    answers = answer if isinstance(answer, list) else [answer]
    return [first_object(one) if isinstance(one, str) else one for one in answers] or [None]


class Choice(LikelihoodScorer):
    """1 when the likeliest of the item's choices is the answer; the first of equally likely ones counts.

    The answer is the text of a choice, its position from 0, or a list of these.

    Attributes:
        normalize: divide each log-likelihood by the choice's UTF-8 bytes or by its tokens.
    """

    normalize: Literal["none", "bytes", "tokens"] = "none"

    def check(self, item: Item) -> None:
        """There are choices, and the answer is among them."""
        if not item.choices:
            raise ValueError("the choice scorer needs `choices`, a list of texts")
        answers = item.answer if isinstance(item.answer, list) else [item.answer]
        positions = [one for one in answers if isinstance(one, int) and not isinstance(one, bool)]
        texts = [one for one in answers if isinstance(one, str)]
        good = set(texts) <= set(item.choices) and all(0 <= one < len(item.choices) for one in positions)
        if not answers or not good or len(positions) + len(texts) < len(answers):
            raise ValueError(
                f"`answer` is {item.answer!r}, but it must be one of `choices` {list(item.choices)!r} "
                "or its position from 0"
            )

    def references(self, item: Item) -> tuple[str, ...]:
        """The item's choices."""
        return item.choices

    def chosen(self, likelihoods: Sequence[Likelihood], item: Item) -> int:
        """Position of the likeliest choice."""
        values = [
            likelihood.total / self._length(likelihood, choice)
            for likelihood, choice in zip(likelihoods, item.choices, strict=True)
        ]
        return values.index(max(values))

    def _length(self, likelihood: Likelihood, choice: str) -> int:
        if self.normalize == "bytes":
            return len(choice.encode())
        return likelihood.tokens if self.normalize == "tokens" else 1

    def __call__(self, likelihoods: Sequence[Likelihood], item: Item) -> float:
        """1.0 or 0.0."""
        answers = item.answer if isinstance(item.answer, list) else [item.answer]
        position = self.chosen(likelihoods, item)
        return float(position in answers or item.choices[position] in answers)


class Nll(LikelihoodScorer):
    """Negative bits per byte of the answer: log-likelihood in nats / (ln 2 * UTF-8 bytes of the answer)."""

    def check(self, item: Item) -> None:
        """The answer is one text."""
        if not isinstance(item.answer, str):
            raise ValueError(f"`answer` is {item.answer!r}, but the nll scorer needs one text")

    def references(self, item: Item) -> tuple[str, ...]:
        """The answer."""
        return (item.answer,)

    def __call__(self, likelihoods: Sequence[Likelihood], item: Item) -> float:
        """At most 0 for a text of one byte or more."""
        return likelihoods[0].total / (math.log(2) * len(item.answer.encode()))


class Python(GenerationScorer):
    """The value of the user's `function(completion, fields)`, a number in [0, 1] or a bool.

    Attributes:
        function: `module:function`; the module must be importable. Its source is part of the digest.
    """

    function: str

    @field_validator("function")
    @classmethod
    def _importable(cls, function: str) -> str:
        _resolve(function)
        return function

    def check(self, item: Item) -> None:
        """Any answer will do: only the function reads it."""

    def identity(self) -> Mapping[str, Any]:
        """The options and the source text of the module."""
        function = _resolve(self.function)
        try:
            source = inspect.getsource(inspect.getmodule(function) or function)
        except (OSError, TypeError):  # compiled: no text to read
            source = ""
        return {**super().identity(), "source": hashlib.sha256(source.encode()).hexdigest()}

    def __call__(self, completion: str, item: Item) -> float:
        """The function's value; raises `FitnessError` when it fails or leaves [0, 1]."""
        where = f"task `{item.task}`, item `{item.id}`: {self.function}"
        try:
            value = _resolve(self.function)(completion, dict(item.fields))
        except Exception as error:
            raise FitnessError(
                f"{where} raised {type(error).__name__}: {error}; it must score every completion"
            ) from error
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise FitnessError(f"{where} returned {value!r}, but it must return a number in [0, 1] or a bool")
        return float(value)


@functools.cache
def _resolve(function: str) -> Callable[..., Any]:
    """The function named `module:function`; `ValueError` naming the part that is wrong."""
    module_name, colon, name = function.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{function!r} must have the form module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ValueError(
            f"module `{module_name}` cannot be imported ({type(error).__name__}: {error}); "
            "put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isroutine(value)]
        raise ValueError(f"module `{module_name}` has no function `{name}`; {suggestion(name, functions)}")
    return found  # type: ignore[no-any-return]


SCORERS: Mapping[str, type[Scorer]] = {
    "exact": Exact,
    "numeric": Numeric,
    "contains": Contains,
    "regex": Regex,
    "json": Json,
    "choice": Choice,
    "nll": Nll,
    "python": Python,
}


def make_scorer(spec: str | Mapping[str, Any], where: str, path: Sequence[Key] = ("scorer",)) -> Scorer:
    """The scorer of a name, or of a mapping with the name as `type` and its options.

    Args:
        where: the file, for error messages.
        path: keys that lead to `spec` inside the file.

    Raises:
        ConfigError: unknown name (the nearest one is named) or wrong options.
    """
    options: Mapping[str, Any] = {"type": spec} if isinstance(spec, str) else spec
    if "type" not in options:
        raise ConfigError(f"{where}: `{dotted([*path, 'type'])}` is missing; {suggestion('', SCORERS)}")
    name = options["type"]
    if not isinstance(name, str) or name not in SCORERS:
        raise ConfigError(
            f"{where}: `{dotted(path)}`: unknown scorer `{name}`; {suggestion(str(name), SCORERS)}"
        )
    rest = {key: value for key, value in options.items() if key != "type"}
    return validate(SCORERS[name], rest, where, path)
