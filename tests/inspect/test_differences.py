"""What a model's folder says other than the base's: configuration keys and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.inspect.differences import differences
from evomerge.inspect.inspection import inspect_models
from evomerge.inspect.tables import difference_line, difference_table
from tests.tiny import tiny_adapter, tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base")


@pytest.fixture
def model(tmp_path: Path, base: Path) -> Path:
    return tiny_model(tmp_path / "model", seed=1, noise_from=base)


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_equal_folders_do_not_differ(base: Path, model: Path):
    found = differences(model, base)
    assert (found.keys, found.added, found.removed, found.moved) == ([], {}, {}, {})
    assert found.files == (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
    )


def test_keys_that_differ_are_listed_with_both_values(base: Path, model: Path):
    change(base / "config.json", rope_scaling={"factor": 2.0, "type": "linear"})
    change(model / "config.json", rope_scaling={"factor": 4.0, "type": "linear"}, extra=None)
    assert differences(model, base).keys == [
        {"file": "config.json", "key": "extra", "model": None},
        {"file": "config.json", "key": "rope_scaling.factor", "base": 2.0, "model": 4.0},
    ]


def test_added_missing_and_moved_tokens_are_listed_by_id(base: Path, model: Path):
    tiny_tokenizer(model, extra=("<think>", "<act>"))
    tiny_tokenizer(base, extra=("<act>", "<old>"))
    found = differences(model, base)
    assert found.added == {"<think>": 128}
    assert found.removed == {"<old>": 129}
    assert found.moved == {"<act>": (128, 129)}


def test_another_chat_template_is_a_difference(base: Path, model: Path):
    (base / "chat_template.jinja").write_text("a")
    (model / "chat_template.jinja").write_text("b")
    (row,) = differences(model, base).keys
    assert row["file"] == "chat_template.jinja"


def test_the_table_names_keys_and_tokens(base: Path, model: Path):
    change(model / "config.json", rope_theta=20000.0)
    tiny_tokenizer(model, extra=("<a>", "<b>", "<c>", "<d>"))
    inspection = inspect_models(base, {"model": model})
    assert difference_table(inspection)[1] == [
        ["model", "config.json", "rope_theta", "10000.0", "20000.0"],
        ["model", "tokenizer", "4 tokens added", "", "<a> (128), <b> (129), <c> (130), and 1 more"],
    ]
    assert difference_line(inspection) is None
    assert "token `<a>` (id 128) is not in the base's" in str(inspection.models[0].problem)


def test_an_adapter_without_files_of_its_own_is_not_called_equal(base: Path, tmp_path: Path):
    inspection = inspect_models(base, {"lora": tiny_adapter(tmp_path / "lora", base)})
    assert inspection.models[0].differences.files == ()
    assert difference_line(inspection) == "No model brings a configuration or a tokenizer of its own."


def test_other_sentencepiece_models_differ(base: Path, model: Path):
    for folder, content in ((base, b"one"), (model, b"another")):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(content)
    found = differences(model, base)
    assert found.sentencepiece
    assert found.added is None
