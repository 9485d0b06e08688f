"""What a user may write for a model: names, folders, hub ids, adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigError
from evomerge.inspect import places
from evomerge.inspect.places import named_places, patterns, place
from evomerge.sources.reference import SourceRef
from tests.tiny import tiny_adapter, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "base")


def test_a_name_may_stand_before_the_place(base: Path):
    assert named_places([f"math={base}"]) == {"math": SourceRef(model=str(base))}


def test_a_bare_folder_is_named_after_itself(tmp_path: Path):
    folder = tiny_model(tmp_path / "Math 7B.v2")
    assert named_places([f"{folder}/"]) == {"Math-7B-v2": SourceRef(model=f"{folder}/")}


def test_an_equals_sign_inside_a_path_names_nothing(tmp_path: Path):
    folder = tiny_model(tmp_path / "lr=3")
    assert named_places([str(folder)]) == {"lr-3": SourceRef(model=str(folder))}


def test_an_adapter_is_told_from_a_model_by_its_files(base: Path, tmp_path: Path):
    folder = tiny_adapter(tmp_path / "lora", base)
    assert place(str(folder), "model `lora`") == SourceRef(adapter=str(folder))


def test_a_model_that_keeps_its_adapters_configuration_is_a_model(base: Path, tmp_path: Path):
    folder = tiny_model(tmp_path / "both")
    (folder / "adapter_config.json").write_text("{}")
    assert place(str(folder), "model `both`") == SourceRef(model=str(folder))


def test_a_hub_id_takes_a_revision(base: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[SourceRef] = []

    def resolve(ref: SourceRef, where: str) -> Path:
        asked.append(ref)
        return base

    monkeypatch.setattr(places, "resolve", resolve)
    expected = SourceRef(model="org/Math-7B", revision="abc")
    assert named_places(["org/Math-7B@abc"]) == {"Math-7B": expected}
    assert asked == [expected]


def test_two_models_of_one_name_are_refused(base: Path):
    with pytest.raises(ConfigError, match=r"its name `a` is that of `.*` too; write NAME="):
        named_places([f"a={base}", f"a={base}"])


def test_the_bases_name_is_refused(base: Path):
    with pytest.raises(ConfigError, match="its name `base` is the base's; write NAME="):
        named_places([str(base)])


def test_patterns_of_one_module_are_gathered():
    assert patterns(["qk=q_proj", "qk=k_proj"]) == {"qk": ["q_proj", "k_proj"]}


def test_a_pattern_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="--module is 'q_proj'; write NAME=PATTERN"):
        patterns(["q_proj"])
