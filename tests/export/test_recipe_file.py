"""`recipe.yaml`: what is read back is the recipe that was written, and a changed file says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from evomerge.errors import ConfigError, RecipeError, SourceError
from evomerge.export.recipe_file import dump_yaml, read_recipe, recipe_document, write_yaml
from evomerge.model import open_recipe
from evomerge.recipe import Cell, Recipe, Setting
from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from evomerge.yamlfile import load_yaml
from tests.tiny import tiny_model

RECIPE = Recipe(
    "base",
    ("math", "code", "far", "lora", "odd"),
    {
        Cell(0, "attention"): Setting(
            "task_arithmetic", {}, {"math": {"weight": 0.333333}, "lora": {"weight": -1}}
        ),
        Cell(1, "attention"): Setting("slerp", {"t": 0.000001}, {"far": {}, "code": {}}),
        Cell(None, "embedding"): Setting(
            "ties", {"normalize": True}, {"odd": {"weight": 1.0, "density": 0.2}}
        ),
    },
    seed=2**32 - 1,
    modules={"q": (r"q_proj\.", "1e5")},
)


@pytest.fixture
def path(family: SourceSet, tmp_path: Path) -> Path:
    write_yaml(tmp_path / "recipe.yaml", recipe_document(RECIPE, family), "a comment\non two lines")
    return tmp_path / "recipe.yaml"


def test_a_recipe_survives_writing_and_reading(path: Path, family: SourceSet):
    recipe, refs, hashes = read_recipe(path)
    assert recipe == RECIPE
    assert recipe.digest == RECIPE.digest
    assert {name: ref.text for name, ref in refs.items()} == {
        name: str(folder.resolve()) for name, folder in family.folders.items()
    }
    assert refs["lora"].key == "adapter"
    assert hashes == family.hashes()


def test_the_comment_is_on_top(path: Path):
    assert path.read_text().startswith("# a comment\n# on two lines\nevomerge_recipe: 1\n")


def test_scores_are_written_and_do_not_change_the_recipe(family: SourceSet, tmp_path: Path):
    write_yaml(tmp_path / "r.yaml", recipe_document(RECIPE, family, {"calibration": 0.5}))
    assert load_yaml(tmp_path / "r.yaml")["scores"] == {"calibration": 0.5}
    assert read_recipe(tmp_path / "r.yaml")[0] == RECIPE


def test_changed_content_with_the_old_digest_is_refused(path: Path):
    path.write_text(path.read_text().replace("0.333333", "0.4"))
    with pytest.raises(RecipeError, match=r"`digest` says .*; remove the `digest` line"):
        read_recipe(path)


def test_changed_content_without_a_digest_is_accepted(path: Path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("digest")]
    path.write_text("\n".join(lines).replace("0.333333", "0.4"))
    assert read_recipe(path)[0].cells[Cell(0, "attention")].models["math"]["weight"] == 0.4


@pytest.mark.parametrize("name", ["base", "far"])
def test_a_source_that_is_not_listed_is_named(path: Path, name: str):
    data = load_yaml(path)
    del data["sources"][name]
    write_yaml(path, data)
    with pytest.raises(RecipeError, match=f"`sources` has no entry for `{name}`"):
        read_recipe(path)


def test_a_source_in_another_form_is_refused(path: Path):
    data = load_yaml(path)
    data["sources"]["far"] = "some/folder"
    write_yaml(path, data)
    with pytest.raises(RecipeError, match=r"`sources\.far` is 'some/folder', but it must hold"):
        read_recipe(path)


def test_relative_sources_count_from_the_recipe(path: Path, tmp_path: Path):
    (tmp_path / "here").mkdir()
    data = load_yaml(path)
    data["sources"]["far"] = {"model": "here"}
    data["sources"]["code"] = {"model": "org/code", "revision": "v1"}
    write_yaml(path, data)
    _, refs, _ = read_recipe(path)
    assert refs["far"] == SourceRef(model=str((tmp_path / "here").resolve()))
    assert refs["code"] == SourceRef(model="org/code", revision="v1")


def test_a_folder_of_the_hubs_cache_can_be_read_again(tmp_path: Path):
    """Such a folder has a commit, but a folder that is given as a path has no revision to ask for."""
    base = tiny_model(tmp_path / "base")
    expert = tiny_model(tmp_path / "snapshots" / "0123abc", 1, noise_from=base)
    sources = SourceSet.open(SourceRef(model=str(base)), {"math": SourceRef(model=str(expert))})
    recipe = Recipe("base", ("math",), {})
    write_yaml(tmp_path / "recipe.yaml", recipe_document(recipe, sources))
    assert open_recipe(tmp_path / "recipe.yaml")[1].folders["math"] == expert


def test_a_source_that_has_changed_is_refused_unless_allowed(tmp_path: Path):
    base = tiny_model(tmp_path / "base")
    expert = tiny_model(tmp_path / "math", 1, noise_from=base)
    sources = SourceSet.open(SourceRef(model=str(base)), {"math": SourceRef(model=str(expert))})
    path = tmp_path / "recipe.yaml"
    write_yaml(path, recipe_document(Recipe("base", ("math",), {}), sources))
    open_recipe(path)
    shutil.rmtree(expert)
    tiny_model(expert, 2, noise_from=base)
    with pytest.raises(SourceError, match=r"source `math` has SHA-256 .*--allow-changed"):
        open_recipe(path)
    assert open_recipe(path, changed=True)[0].models == ("math",)


def test_no_such_file_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "text", ["1e5", "12e34567", "1.5E3", "no", "2026-01-01", "0x1f", "null", "~", "a: b"]
)
def test_text_that_looks_like_something_else_survives(tmp_path: Path, text: str):
    """Model names and commits are text, whatever they look like to YAML 1.1 or 1.2."""
    write_yaml(tmp_path / "file.yaml", {"sources": {text: {"revision": text}}})
    assert load_yaml(tmp_path / "file.yaml") == {"sources": {text: {"revision": text}}}


@pytest.mark.parametrize("value", [1e-6, -1e-6, 1e22, 0.1, 1.0, 123456.789012])
def test_numbers_survive_in_our_yaml_and_in_yaml_1_1(tmp_path: Path, value: float):
    write_yaml(tmp_path / "file.yaml", {"value": value})
    assert (
        load_yaml(tmp_path / "file.yaml") == yaml.safe_load(dump_yaml({"value": value})) == {"value": value}
    )
