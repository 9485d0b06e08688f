"""Scorers against hand-made tables of completions; definitions of likelihood scores; refusals."""

from __future__ import annotations

import json
import math
import sys

import pytest

from evomerge.engine.base import Likelihood
from evomerge.errors import ConfigError, FitnessError
from evomerge.evaluate.items import Item
from evomerge.evaluate.scorers import SCORERS, GenerationScorer, LikelihoodScorer, make_scorer

NAMES = "exact, numeric, contains, regex, json, choice, nll, python"
MINUS = "\N{MINUS SIGN}"


def item(answer, choices=(), **fields):
    return Item("task", "id", "calibration", "prompt", answer, tuple(choices), fields)


def scorer(spec):
    return make_scorer(spec, "suite.yaml", ("tasks", "math", "scorer"))


def likelihoods(*totals, tokens=None):
    return [Likelihood(total, n) for total, n in zip(totals, tokens or [1] * len(totals), strict=True)]


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("42", "42", 1),
        ("42.", "42", 1),
        (" 42\n", "42", 1),
        ("42", 42, 1),
        ("42.0", 42, 1),
        ("42", 42.0, 1),
        ("43", "42", 0),
        ("", "42", 0),
        ("no number", "42", 0),
        ("= 12", "12", 1),
        ("x=-3", "-3", 1),
        ("The answer is 12 apples.", "12", 1),
        ("3 apples and 5", "3", 1),
        ("3 apples and 5", "5", 0),
        ("1,234", "1234", 1),
        ("1,234,567.5", 1234567.5, 1),
        ("1234", "1,234", 1),
        ("1,23", "1", 1),
        ("12, 13", "12", 1),
        ("1,2345", "1", 1),
        ("-3", "-3", 1),
        ("-3", "3", 0),
        (f"{MINUS}7", -7, 1),
        ("\N{EN DASH}7", -7, 1),
        ("10-3", "10", 1),
        ("COVID-19", "19", 1),
        ("3.50", "3.5", 1),
        (".5", 0.5, 1),
        ("0.1", 0.1, 1),
        ("0.30000000000000004", 0.3, 0),
        ("$5", "5", 1),
        ("-$5.20", "-5.2", 1),
        ("50%", "50", 1),
        ("2e3", 2000, 1),
        ("1e999999999999999999999", "7", 0),
        ("9" * 5000, "9", 0),
        ("0042", "42", 1),
        ("٤٢", "42", 0),
        ("13", ["12", "13"], 1),
        ("3.14159", 3.14, 0),
    ],
)
def test_numeric_compares_the_first_number(completion, answer, value):
    assert scorer("numeric")(completion, item(answer)) == value


@pytest.mark.parametrize(
    ("options", "completion", "answer", "value"),
    [
        ({"which": "last"}, "3 apples and 5", "5", 1),
        ({"which": "last"}, "3 apples and 5", "3", 0),
        ({"which": "last"}, "10-3", "3", 1),
        ({"which": "last"}, "so 1,234.", "1234", 1),
        ({"tolerance": 0.01}, "3.14159", 3.14, 1),
        ({"tolerance": 0.001}, "3.14159", 3.14, 0),
        ({"tolerance": 0.1}, "0.3", 0.2, 1),  # exact decimals: luck in floats
        ({"tolerance": 1}, "1e999", 3, 0),
    ],
)  # fmt: skip
def test_numeric_options(options, completion, answer, value):
    assert scorer({"type": "numeric", **options})(completion, item(answer)) == value


@pytest.mark.parametrize(
    ("options", "completion", "answer", "value"),
    [
        ({}, "Paris", "Paris", 1),
        ({}, " Paris\n", "Paris", 1),
        ({}, "paris", "Paris", 0),
        ({}, "Paris.", "Paris", 0),
        ({}, "", "Paris", 0),
        ({}, "It is Paris", "Paris", 0),
        ({}, "b", ["a", "b"], 1),
        ({}, "42", 42, 1),
        ({}, "42.", 42, 0),
        ({}, "true", True, 1),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
        ({"strip_period": True}, "Paris.", "Paris", 1),
        ({"strip_period": True}, "Paris..", "Paris", 0),
        ({"strip_period": True}, "Mr.", "Mr.", 1),
    ],
)
def test_exact(options, completion, answer, value):
    assert scorer({"type": "exact", **options})(completion, item(answer)) == value


@pytest.mark.parametrize(
    ("options", "completion", "answer", "value"),
    [
        ({}, "It is Paris, of course", "Paris", 1),
        ({}, "It is paris", "Paris", 0),
        ({}, "", "Paris", 0),
        ({}, "42", 4, 1),
        ({}, "blue", ["red", "blue"], 1),
        ({"ignore_case": True}, "It is PARIS", "Paris", 1),
    ],
)
def test_contains(options, completion, answer, value):
    assert scorer({"type": "contains", **options})(completion, item(answer)) == value


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "value"),
    [
        (r"answer is (\w+)", "The answer is 12.", "12", 1),
        (r"answer is (\w+)", "The answer is 13.", "12", 0),
        (r"answer is (\w+)", "The answer is 13. The answer is 12.", "12", 0),
        (r"answer is (\w+)", "no idea", "12", 0),
        (r"answer is (\w+)", "", "12", 0),
        (r"\{\{(.*?)\}\}", "{{ 12 }}", "12", 1),
        (r"(?:yes|no)", "well, yes", "unused", 1),
        (r"^(?:yes|no)$", "well, yes", "unused", 0),
        (r"a(b)?", "ac", "b", 0),
    ],
)
def test_regex_compares_its_group_or_merely_matches(pattern, completion, answer, value):
    assert scorer({"type": "regex", "pattern": pattern})(completion, item(answer)) == value


NESTED = {"a": {"b": [1, {"c": None}]}, "d": "}"}


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ('{"a": 1}', {"a": 1}, 1),
        ('{"b": 2, "a": 1}', {"a": 1, "b": 2}, 1),
        ('{"a": 1.0}', {"a": 1}, 1),
        ('{"a": true}', {"a": 1}, 0),
        ('{"a": "1"}', {"a": 1}, 0),
        ('{"a": 1, "b": 2}', {"a": 1}, 0),
        ('Sure! Here it is: {"a": 1} Bye {', {"a": 1}, 1),
        ('{oops} {"a": 1}', {"a": 1}, 1),
        ('{"a": 2} {"a": 1}', {"a": 1}, 0),
        ('```json\n{"a": 1}\n```', {"a": 1}, 1),
        (json.dumps(NESTED), NESTED, 1),
        ('{"a": {"b": [1, {"c": false}]}, "d": "}"}', NESTED, 0),
        ('{"a": 1', {"a": 1}, 0),
        ('["a", 1]', {"a": 1}, 0),
        ('[{"a": 1}]', {"a": 1}, 1),
        ("", {"a": 1}, 0),
        ("{}", {"a": 1}, 0),
        ('{"a":' * 2000, {"a": 1}, 0),
        ('{"a": ' + "9" * 5000 + "}", {"a": 1}, 0),
        ('{"a": 2}', [{"a": 1}, {"a": 2}], 1),
        ('{"a": 1}', '{"a": 1}', 1),
    ],
)
def test_json_compares_the_first_object(completion, answer, value):
    assert scorer("json")(completion, item(answer)) == value


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ('{"a": 1, "b": 2}', 1),
        ('{"a": 1, "b": 3}', 1 / 2),
        ('{"a": 1}', 1 / 2),
        ('{"a": 1, "b": 2, "c": 3}', 2 / 3),
        ('{"x": 1}', 0),
        ("nothing", 0),
    ],
)
def test_partial_json_gives_the_share_of_right_keys(completion, value):
    found = scorer({"type": "json", "partial": True})(completion, item({"a": 1, "b": 2}))
    assert found == pytest.approx(value)


def test_choice_takes_the_likeliest():
    question = item("red", ["red", "blue"])
    assert scorer("choice")(likelihoods(-1.0, -2.0), question) == 1
    assert scorer("choice")(likelihoods(-2.0, -1.0), question) == 0
    assert scorer("choice")(likelihoods(-math.inf, -1.0), question) == 0


@pytest.mark.parametrize("answer", ["blue", 1, ["blue", "green"], [1]])
def test_choice_knows_its_answer_by_text_or_position(answer):
    question = item(answer, ["red", "blue", "green"])
    assert scorer("choice")(likelihoods(-3.0, -1.0, -2.0), question) == 1
    assert scorer("choice")(likelihoods(-1.0, -2.0, -3.0), question) == 0


@pytest.mark.parametrize(("normalize", "value"), [("none", 0), ("bytes", 1), ("tokens", 0)])
def test_choice_normalises_by_bytes_or_tokens(normalize, value):
    # per nat: -4 / -3; per byte (4 and 2, "é" has two): -1 / -1.5; per token (1 and 3): -4 / -1
    question = item("long", ["long", "é"])
    answers = likelihoods(-4.0, -3.0, tokens=[1, 3])
    assert scorer({"type": "choice", "normalize": normalize})(answers, question) == value


def test_choice_counts_bytes_and_not_characters():
    # per byte -1 and -0.75; per character -1 and -1.5
    question = item("é", ["long", "é"])
    assert scorer({"type": "choice", "normalize": "bytes"})(likelihoods(-4.0, -1.5), question) == 1


def test_nll_is_negative_bits_per_byte():
    # 16 bits over the 4 bytes of "aé!" are 4 bits per byte
    answers = likelihoods(-16 * math.log(2))
    assert scorer("nll")(answers, item("aé!")) == pytest.approx(-4.0)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module with good and bad scorers."""
    (tmp_path / "own_scorers.py").write_text(
        "def length(text, fields):\n    return min(1, len(text) / fields['longest'])\n"
        "def same(text, fields):\n    return text == fields['word']\n"
        "def wild(text, fields):\n    return 7\n"
        "def broken(text, fields):\n    return fields['nothing']\n"
        "VALUE = 3\n"
    )
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('half written')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_scorers", None)


def python_scorer(name):
    return scorer({"type": "python", "function": name})


def test_python_calls_the_function_with_text_and_fields(own_module):
    assert python_scorer("own_scorers:length")("abcd", item("x", longest=16)) == 0.25
    assert python_scorer("own_scorers:same")("abcd", item("x", word="abcd")) == 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("own_scorers", r"scorer\.function`: 'own_scorers' must have the form module:function"),
        ("nowhere_at_all:f", r"module `nowhere_at_all` cannot be imported \(ModuleNotFoundError.*PYTHONPATH"),
        ("broken_module:f", r"module `broken_module` cannot be imported \(RuntimeError: half written\)"),
        ("own_scorers:lenght", r"`own_scorers` has no function `lenght`; did you mean `length`\?"),
        ("own_scorers:VALUE", r"`own_scorers` has no function `VALUE`"),
    ],
)
def test_a_python_scorer_that_cannot_be_found_is_named(own_module, function, message):
    with pytest.raises(ConfigError, match=message):
        python_scorer(function)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wild", r"item `id`: own_scorers:wild returned 7, but .* \[0, 1\]"),
        ("broken", r"item `id`: own_scorers:broken raised KeyError: 'nothing'"),
    ],
)
def test_a_python_scorer_that_misbehaves_is_named(own_module, name, message):
    with pytest.raises(FitnessError, match=message):
        python_scorer(f"own_scorers:{name}")("text", item("x"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numerc", "suite.yaml: `tasks.math.scorer`: unknown scorer `numerc`; did you mean `numeric`?"),
        ({"type": ["x"]}, f"suite.yaml: `tasks.math.scorer`: unknown scorer `['x']`; allowed: {NAMES}"),
        ({"pattern": "x"}, f"suite.yaml: `tasks.math.scorer.type` is missing; allowed: {NAMES}"),
        ({"type": "numeric", "wich": "last"},
         "suite.yaml: unknown key `tasks.math.scorer.wich`; did you mean `which`?"),
        ({"type": "numeric", "which": "lst"},
         "suite.yaml: `tasks.math.scorer.which` is 'lst'; did you mean `last`?"),
        ({"type": "numeric", "tolerance": -1},
         "suite.yaml: `tasks.math.scorer.tolerance` is -1, but it should be greater than or equal to 0"),
        ("regex", "suite.yaml: `tasks.math.scorer.pattern` is missing; add it"),
        ({"type": "regex", "pattern": "(a)(b)"},
         "suite.yaml: `tasks.math.scorer.pattern`: '(a)(b)' has 2 groups, but it may have one; "
         "write others as (?:...)"),
        ({"type": "regex", "pattern": "("},
         "suite.yaml: `tasks.math.scorer.pattern`: '(' is not a regular expression (missing ), "
         "unterminated subpattern at position 0)"),
    ],
)  # fmt: skip
def test_a_wrong_scorer_is_refused_with_its_key(spec, message):
    with pytest.raises(ConfigError) as caught:
        scorer(spec)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "answer", "choices"),
    [
        ("exact", {"a": 1}, ()),
        ("exact", [], ()),
        ("exact", ["a", None], ()),
        ("contains", [""], ()),
        ("numeric", "twelve", ()),
        ("numeric", "1 or 2", ()),
        ("json", "no object", ()),
        ("json", [], ()),
        ("json", {}, ()),
        ("json", 3, ()),
        ("choice", "red", ()),
        ("choice", "green", ("red", "blue")),
        ("choice", 2, ("red", "blue")),
        ("choice", -1, ("red", "blue")),
        ("choice", True, ("red", "blue")),
        ("choice", [], ("red", "blue")),
        ("nll", 3, ()),
        ("nll", ["a"], ()),
    ],
)
def test_an_answer_that_a_scorer_cannot_use_is_refused(name, answer, choices):
    with pytest.raises(ValueError, match=r"`answer`|`choices`"):
        scorer(name).check(item(answer, choices))


OPTIONS = {"regex": {"pattern": "(.*)"}, "python": {"function": "operator:ne"}}
ANSWERS = {"json": {"a": 1}}


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_of_the_table_gives_a_float_for_an_empty_answer(name):
    made = scorer({"type": name, **OPTIONS.get(name, {})})
    question = item(ANSWERS.get(name, "1"), ["1", "2"])
    made.check(question)
    assert (made.needs == "generation") is isinstance(made, GenerationScorer)
    if isinstance(made, LikelihoodScorer):
        value = made(likelihoods(*[-1.0] * len(made.references(question))), question)
    else:
        value = made("", question)
        assert 0 <= value <= 1
    assert type(value) is float
    json.dumps(made.identity())
