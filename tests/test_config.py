"""Run files: strict, with one clear sentence for each mistake; and what a resumed run must find unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evomerge.config import RunConfig, differences, load_config
from evomerge.errors import ConfigError
from evomerge.resources import find_resource
from evomerge.template import TEMPLATE, write_template
from evomerge.yamlfile import file_size

SMALLEST = {
    "base_model": "./base",
    "models": {"math": "./math", "spanish": {"adapter": "./spanish"}},
    "fitness": "./fitness.yaml",
    "budget": {"trials": 10},
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, **changes}), encoding="utf-8")
    return path


def test_the_smallest_run_file_is_enough(tmp_path: Path):
    loaded = load_config(write(tmp_path))
    assert loaded.name == "mine"
    assert loaded.run_dir == tmp_path / "mine"
    assert loaded.config.search.optimizer == "cma"


def test_relative_paths_count_from_the_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path)
    monkeypatch.chdir("/")
    loaded = load_config(path)
    assert loaded.base().model == str(tmp_path / "base")
    assert loaded.models()["spanish"].adapter == str(tmp_path / "spanish")


def test_a_hub_id_stays_a_hub_id(tmp_path: Path):
    models = {"math": {"model": "org/math", "revision": "abc"}}
    ref = load_config(write(tmp_path, models=models)).models()["math"]
    assert (ref.model, ref.revision) == ("org/math", "abc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serach": {}}, "unknown key `serach`; did you mean `search`"),
        ({"search": {"popsize": 4}}, "unknown key `search.popsize`; did you mean `population_size`"),
        ({"budget": {"trials": "many"}}, "`budget.trials` is 'many'"),
        ({"budget": {}}, "no limit is set"),
        ({"budget": {"time": "all night"}}, "time budget 'all night' is not understood"),
        ({"models": {}}, "`models`"),
        ({"models": {"base": "./x"}}, "model name 'base' is not allowed"),
        ({"models": {"a": {"model": "./x", "adapter": "./y"}}}, "exactly one of `model` and `adapter`"),
        ({"seed": -1}, "`seed` is -1"),
        ({"engine": {"dtype": "int8"}}, "`engine.dtype` is 'int8'"),
        ({"search": {"stages": [{"space": "global", "sigma": 2.0}]}}, r"`search.stages\[0\].sigma` is 2.0"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path: Path, changes: dict[str, object], message: str):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_missing_run_file_is_one_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_a_space_may_be_named_written_out_or_given_as_a_path(tmp_path: Path):
    own = {"methods": ["ties"], "parameters": {"weight": {"low": 0, "high": 1}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    stages = [{"space": "global"}, {"space": "own.yaml"}, {"space": own}]
    loaded = load_config(write(tmp_path, search={"stages": stages}))
    assert [loaded.spaces(i)[0][0] for i in range(3)] == ["1:global", "2:own", "3"]


def test_a_stage_may_name_alternative_spaces(tmp_path: Path):
    loaded = load_config(write(tmp_path, search={"stages": [{"space": ["global", "ties"]}]}))
    assert [name for name, _, _ in loaded.spaces(0)] == ["1:global", "1:ties"]


@pytest.mark.parametrize(("written", "size"), [("500MB", 500_000_000), ("2GiB", 2 << 30), (10**9, 10**9)])
def test_a_file_size_has_a_unit_or_is_a_number_of_bytes(tmp_path: Path, written: str | int, size: int):
    loaded = load_config(write(tmp_path, export={"max_shard_size": written}))
    assert loaded.config.export.max_shard_size == size
    assert file_size(written, "max_shard_size") == size


@pytest.mark.parametrize("written", ["5", 5, "many", "-1GB"])
def test_a_file_size_that_is_none_or_tiny_is_refused(tmp_path: Path, written: str | int):
    with pytest.raises(ConfigError, match=r"export\.max_shard_size"):
        load_config(write(tmp_path, export={"max_shard_size": written}))
    with pytest.raises(ConfigError, match=f"max_shard_size is {written!r}; .* such as 500MB, 5GB or 2GiB"):
        file_size(written, "max_shard_size")


def test_an_unknown_space_names_the_nearest(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean `global`"):
        find_resource("search_spaces", "globale", tmp_path, "run.yaml")


def test_a_changed_space_file_changes_what_a_resumed_run_compares(tmp_path: Path):
    own = {"methods": ["ties"], "parameters": {"weight": {"low": 0, "high": 1}}}
    path = write(tmp_path, search={"stages": [{"space": "own.yaml"}]})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    before = load_config(path).frozen()
    own["parameters"]["weight"]["high"] = 2  # type: ignore[index]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    assert differences(before, load_config(path).frozen()) != []


def test_differences_name_the_key_and_both_values():
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [1], "e": None}
    assert differences(old, new) == ["a.c: 2 -> 3"]


def test_the_template_is_a_valid_run_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    write_template(path)
    assert load_config(path).config.budget.time == "8h"


def test_the_template_states_the_defaults():
    """What `init` writes for sections that are left out elsewhere is what leaving them out means."""
    written = RunConfig.model_validate(yaml.safe_load(TEMPLATE))
    least = RunConfig.model_validate(SMALLEST)
    for section in ("items", "search", "fixed", "selection", "engine", "export", "modules", "seed"):
        assert getattr(written, section) == getattr(least, section), section


def test_the_template_overwrites_nothing(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="the file exists"):
        write_template(path)
    assert path.read_text(encoding="utf-8") == "mine"
