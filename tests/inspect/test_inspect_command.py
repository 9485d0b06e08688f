"""`evomerge inspect` in its forms: models on the line, a run file, JSON, a page; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.inspect.inspection import inspect_models
from evomerge.inspect.tables import as_json
from tests.conftest import Command
from tests.tiny import tiny_model
from tests.world import World

WAYS = ("by_layer", "by_module", "by_cell")


@pytest.fixture
def words(world: World) -> list[str]:
    names = {"one": "one", "two": "two", "lora": "adapter"}
    return ["--base", f"{world.folder}/base", *(f"{k}={world.folder / v}" for k, v in names.items())]


def test_the_summary_has_a_row_per_model_and_per_pair(command: Command, words: list[str]):
    code, out, err = command("inspect", *words)
    assert code == 0, err
    first = [line.split("  ")[0] for line in out.splitlines()]
    assert [name for name in first if name in ("one", "two", "lora")] == ["one", "two", "lora"]
    assert [name for name in first if "/" in name] == ["one / two", "one / lora", "two / lora"]
    assert "Mean kinship over 3 pairs" in out
    assert "arXiv:2410.12613" in out
    assert "counted exactly" in out


def test_json_is_the_whole_inspection(command: Command, words: list[str], world: World):
    code, out, _ = command("inspect", *words, "--json")
    assert code == 0
    models = {"one": world.folder / "one", "two": world.folder / "two", "lora": world.folder / "adapter"}
    expected = as_json(inspect_models(world.folder / "base", models))
    found = json.loads(out)
    assert found == json.loads(json.dumps(expected))
    assert [row["models"] for row in found["pairs"]] == [["one", "two"], ["one", "lora"], ["two", "lora"]]
    assert all(row[way] for row in (*found["models"], *found["pairs"]) for way in WAYS)
    assert found["kinship"]["pairs"] == 3


def test_a_run_file_gives_base_models_and_modules(command: Command, world: World):
    world.run["modules"] = {"query": ["q_proj"]}
    code, out, _ = command("inspect", world.write(), "--json")
    assert code == 0
    found = json.loads(out)
    assert [(row["name"], row["kind"]) for row in found["models"]] == [
        ("one", "model"),
        ("two", "model"),
        ("lora", "adapter"),
    ]
    assert "query" in found["models"][0]["by_module"]


@pytest.mark.parametrize(
    ("by", "label"), [("layer", "none"), ("module", "attention"), ("cell", "layers[2].mlp")]
)
def test_long_tables_are_by_layer_module_or_cell(command: Command, words: list[str], by: str, label: str):
    code, out, _ = command("inspect", *words, "--by", by)
    assert code == 0
    assert sum(f" {label} " in line for line in out.splitlines()) == 6  # three models, three pairs


def test_modules_can_be_named(command: Command, words: list[str]):
    code, out, _ = command("inspect", *words, "--module", "query=q_proj", "--by", "module")
    assert code == 0
    assert " query " in out


def test_the_page_is_written_and_json_stays_clean(command: Command, words: list[str], tmp_path: Path):
    target = tmp_path / "page.html"
    code, out, err = command("inspect", *words, "--json", "--html", target)
    assert code == 0
    json.loads(out)
    assert f"Wrote {target}" in err
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_one_model_alone_has_no_pairs(command: Command, world: World):
    code, out, _ = command("inspect", "--base", world.folder / "base", world.folder / "one")
    assert code == 0
    assert "cosine" not in out
    assert "kinship" not in out


def test_a_model_that_does_not_fit_is_shown_with_the_reason(command: Command, world: World):
    big = tiny_model(world.folder / "big", vocab=160, layers=3)
    code, out, _ = command("inspect", "--base", world.folder / "base", big, world.folder / "one")
    assert code == 0
    assert "big cannot be merged: its vocabulary has 160 entries, the base's has 128" in out
    assert "big: 1 tensor left out of its numbers: `model.embed_tokens.weight` has shape (160, 64)" in out


REFUSED = [
    (["{f}/one"], "--base is missing"),
    (["--base", "{f}/base", "{f}/tiny.yaml"], "names base and models; give it alone"),
    (["{f}/tiny.yaml", "{f}/one"], "names base and models; give it alone"),
    (["--base", "{f}/base", "{f}/nowhere"], "model `nowhere`: folder"),
    (["--base", "{f}/nowhere", "{f}/one"], "base `base`: folder"),
    (["--base", "{f}/adapter", "{f}/one"], "is an adapter; give a full model"),
    (["--base", "{f}/base", "{f}/one", "{f}/one"], "its name `one` is that of"),
    (["--base", "{f}/base", "{f}/one", "--by", "tensor"], "--by is 'tensor'; choose one of layer, module"),
    (["--base", "{f}/base", "{f}/one", "--module", "q_proj"], "write NAME=PATTERN"),
    (["--base", "{f}/base", "{f}/one", "--module", "q=("], "is not a regular expression"),
    (["--base", "{f}/base", "{f}/one", "--html", "{f}/no/page.html"], "cannot be written"),
    (["{f}/none.yaml"], "no such file"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_ends_in_one_message(command: Command, world: World, line: list[str], message: str):
    code, out, err = command("inspect", *(word.format(f=world.folder) for word in line))
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err
