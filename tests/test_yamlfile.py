"""Strict YAML: scalars, duplicate keys, and one precise sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, field_validator

from evomerge.errors import ConfigError
from evomerge.yamlfile import Section, load_yaml, validate


class Inner(Section):
    depth: int = 1
    colour: Literal["red", "green"] = "red"


class Outer(Section):
    name: str
    rate: float = Field(0.5, gt=0)
    stop: tuple[str, ...] = ()
    data: str | list[str] | Inner = "x"
    parts: dict[str, Inner] = Field(default_factory=dict)
    by_split: dict[Literal["calibration", "selection"], int] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _lower(cls, name: str) -> str:
        if name != name.lower():
            raise ValueError(f"{name!r} must be in lower case")
        return name


def load_text(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return load_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        ("-2.5e3", -2500.0),
        (".5", 0.5),
        ("12", 12),
        ("-3", -3),
        ("0", 0),
        ("010", "010"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("2026-01-01", "2026-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-5'", "1e-5"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path, text, value):
    found = load_text(tmp_path, f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_merge_keys_may_be_overridden_at_any_depth(tmp_path):
    text = "a: &a {x: 1, y: 1}\ndeep: {inner: &b {<<: *a, x: 2}}\nc: {<<: *b}\n"
    assert load_text(tmp_path, text)["c"] == {"x": 2, "y": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", r"file\.yaml: line 4: key `c` is given twice"),
        ("a: [1\nb: 2\n", r"file\.yaml: line 2: not YAML: .*; correct"),
        ("- 1\n- 2\n", r"file\.yaml: the file is a list, but it must be a mapping"),
        ("", r"file\.yaml: the file is empty, but it must be a mapping"),
        ("a: 1\n---\nb: 2\n", r"file\.yaml: line 2: not YAML"),
        ("a: !!python/object:os.system {}\n", r"file\.yaml: line 1: not YAML"),
        ("a: \x07\n", r"file\.yaml: not YAML: .*; correct"),
    ],
)
def test_a_file_that_is_not_a_mapping_of_unique_keys_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_text(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; check the path"):
        load_yaml(tmp_path / "nowhere.yaml")


def test_valid_data_becomes_an_instance():
    outer = validate(Outer, {"name": "a", "stop": ["\n"], "parts": {"p": {"depth": 3}}}, "f.yaml")
    assert outer.stop == ("\n",)
    assert outer.parts["p"].depth == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "rat": 1}, "f.yaml: unknown key `rat`; did you mean `rate`?"),
        ({"name": "a", "zzz": 1},
         "f.yaml: unknown key `zzz`; allowed: name, rate, stop, data, parts, by_split"),
        ({"name": "a", "parts": {"p": {"dept": 1}}},
         "f.yaml: unknown key `parts.p.dept`; did you mean `depth`?"),
        ({"name": "a", "data": {"dept": 1}}, "f.yaml: unknown key `data.dept`; did you mean `depth`?"),
        ({"name": "a", "parts": {"p": {"colour": "rod"}}},
         "f.yaml: `parts.p.colour` is 'rod'; did you mean `red`?"),
        ({"name": "a", "by_split": {"calibratoin": 1}},
         "f.yaml: unknown key `by_split.calibratoin`; did you mean `calibration`?"),
        ({}, "f.yaml: `name` is missing; add it"),
        ({"name": "a", "rate": 0}, "f.yaml: `rate` is 0, but it should be greater than 0"),
        ({"name": "a", "rate": float("nan")}, "f.yaml: `rate` is nan, but it should be a finite number"),
        ({"name": "a", "stop": "x"}, "f.yaml: `stop` is 'x', but it should be a valid list"),
        ({"name": "a", "stop": ["x", 3]}, "f.yaml: `stop[1]` is 3, but it should be a valid string"),
        ({"name": "A"}, "f.yaml: `name`: 'A' must be in lower case"),
        ({"name": "a", 3: 4}, "f.yaml: key `3` in `file` must be text; quote it"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_sentence_with_its_key(data, message):
    with pytest.raises(ConfigError) as caught:
        validate(Outer, data, "f.yaml")
    assert str(caught.value) == message


def test_several_mistakes_are_one_error_with_a_line_each():
    with pytest.raises(ConfigError) as caught:
        validate(Outer, {"rate": -1, "colour": 1}, "f.yaml")
    assert len(str(caught.value).splitlines()) == 3


def test_a_path_inside_the_file_stands_before_the_key():
    with pytest.raises(ConfigError, match=r"f\.yaml: unknown key `tasks\.math\.scorer\.dept`"):
        validate(Inner, {"dept": 1}, "f.yaml", ("tasks", "math", "scorer"))
