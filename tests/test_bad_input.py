"""Bad input: exit code 2 and one clear message before any model is built, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from evomerge import build
from tests.conftest import Command
from tests.tiny import tiny_adapter, tiny_model
from tests.world import World, item_rows, write_items


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building the engine is the first expensive step; no bad input may get there."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the engine was built before the input was checked")

    monkeypatch.setattr(build, "open_engine", refuse)


def missing_file(world: World) -> None:
    world.run["fitness"] = "nowhere.yaml"


def missing_model(world: World) -> None:
    world.run["models"]["one"] = "./nowhere"


def unknown_key(world: World) -> None:
    world.run["budgett"] = {"trials": 1}


def wrong_type(world: World) -> None:
    world.run["budget"]["trials"] = "many"


def density_above_one(world: World) -> None:
    space = {
        "methods": ["ties"],
        "parameters": {"weight": {"low": 0, "high": 1}, "density": {"low": 0.1, "high": 1.3}},
    }
    world.run["search"]["stages"] = [{"space": space}]


def other_shapes(world: World) -> None:
    tiny_model(world.folder / "wide", hidden=96, layers=3)
    world.run["models"]["one"] = "./wide"


def other_vocabulary(world: World) -> None:
    tiny_model(world.folder / "words", vocab=160, layers=3)
    world.run["models"]["one"] = "./words"


def adapter_for_another_base(world: World) -> None:
    other = tiny_model(world.folder / "other", hidden=96, layers=3)
    tiny_adapter(world.folder / "foreign", other)
    world.run["models"]["lora"] = {"adapter": "./foreign"}


def truncated_file(world: World) -> None:
    path = world.folder / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_split(world: World) -> None:
    write_items(world.items, [row for row in item_rows() if row["split"] != "selection"])


def same_item_in_two_splits(world: World) -> None:
    rows = item_rows()
    rows.append({**rows[0], "id": "again", "split": "held_out"})
    write_items(world.items, rows)


def unwritable_run_directory(world: World) -> None:
    (world.folder / "file").write_text("", encoding="utf-8")
    world.run["run_dir"] = "./file/run"


def unknown_optimizer(world: World) -> None:
    world.run["search"]["optimizer"] = "cmaa"


def unknown_sampler_option(world: World) -> None:
    world.run["search"] = {**world.run["search"], "optimizer": "tpe", "options": {"n_startup_trial": 3}}


CASES: list[tuple[Callable[[World], None], str]] = [
    (missing_file, "nowhere.yaml"),
    (missing_model, "model `one`"),
    (unknown_key, "unknown key `budgett`; did you mean `budget`"),
    (wrong_type, "`budget.trials` is 'many'"),
    (density_above_one, "density is 1.3, but it is the fraction"),
    (other_shapes, "model `one`"),
    (other_vocabulary, "model `one`"),
    (adapter_for_another_base, "model `lora`"),
    (truncated_file, "model.safetensors"),
    (empty_split, "has no item in split `selection`"),
    (same_item_in_two_splits, "splits must be disjoint"),
    (unwritable_run_directory, "cannot be written"),
    (unknown_optimizer, "cmaa"),
    (unknown_sampler_option, "n_startup_trial"),
]


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=lambda c: getattr(c, "__name__", ""))
def test_search_refuses_in_one_message(
    world: World, command: Command, spoil: Callable[[World], None], message: str
):
    spoil(world)
    code, out, err = command("search", world.write())
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out
    assert not world.run_dir.exists(), "nothing may be left that looks like a run"


def test_a_missing_run_file_is_refused(command: Command, tmp_path: Path):
    code, _, err = command("search", tmp_path / "none.yaml")
    assert code == 2
    assert "no such file" in err


def test_a_run_that_was_begun_is_not_begun_again(world: World, command: Command):
    world.run_dir.mkdir()
    (world.run_dir / build.CONFIG).write_text("{}", encoding="utf-8")
    code, _, err = command("search", world.run_file)
    assert code == 2
    assert "a run was begun here; go on with `evomerge resume" in err


def test_resuming_what_was_never_begun_is_refused(world: World, command: Command):
    assert command("resume", world.run_dir)[0] == 2
    assert command("search", "--resume", world.run_file)[0] == 2


def test_a_run_directory_in_use_by_another_process_is_refused(world: World, command: Command):
    world.run_dir.mkdir()
    hold = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(world.run_dir / build.LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        code, _, err = command("search", world.run_file)
        assert other.stdin is not None
        other.stdin.close()
    assert code == 2
    assert "another process is using this run directory" in err


def test_a_changed_configuration_is_refused_with_the_difference(world: World, command: Command):
    parts = build.Parts.open(build.load_config(world.run_file))
    with build.Run(parts):
        pass
    world.run["search"]["population_size"] = 6
    code, _, err = command("search", "--resume", world.write())
    assert code == 2
    assert "config.search.population_size: 4 -> 6" in err


def test_a_changed_storage_is_refused(world: World, command: Command):
    with build.Run(build.Parts.open(build.load_config(world.run_file))):
        pass
    world.run["storage"] = f"sqlite:///{world.folder}/other.db"
    code, _, err = command("search", "--resume", world.write())
    assert code == 2
    assert "config.storage: null -> " in err


def test_changed_items_are_refused(world: World, command: Command):
    with build.Run(build.Parts.open(build.load_config(world.run_file))):
        pass
    write_items(world.items, [{**row, "answer": "z"} for row in item_rows()])
    code, _, err = command("search", "--resume", world.run_file)
    assert code == 2
    assert "items: " in err


def test_changed_weights_are_refused(world: World, command: Command):
    with build.Run(build.Parts.open(build.load_config(world.run_file))):
        pass
    path = world.folder / "one" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, path, metadata={"format": "pt"})
    code, _, err = command("search", "--resume", world.run_file)
    assert code == 2
    assert "sources.one: " in err


def test_an_error_is_printed_once(tmp_path: Path):
    """In a process of its own: logging prints to standard error when nobody has set it up."""
    words = [sys.executable, "-m", "evomerge", "status", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("no run was begun here") == 1
    assert done.stdout == ""


def test_several_mistakes_in_one_file_are_all_named(world: World, command: Command):
    world.run["seed"] = -1
    world.run["budgett"] = 1
    _, _, err = command("check", world.write())
    assert "`seed` is -1" in err
    assert "`budgett`" in err


def test_a_dtype_that_models_are_not_written_in(world: World, command: Command):
    code, _, err = command("merge", world.folder / "recipe.yaml", world.folder / "out", "--dtype", "int8")
    assert code == 2
    assert "dtype is 'int8'; it can be bfloat16, float16, float32" in err


def test_a_size_of_files_without_a_unit(world: World, command: Command):
    code, _, err = command(
        "merge", world.folder / "recipe.yaml", world.folder / "out", "--max-shard-size", "5"
    )
    assert code == 2
    assert "max_shard_size is '5'; it can be a size of at least 1MB, such as 500MB, 5GB or 2GiB" in err


@pytest.mark.parametrize("words", [["merge", "none.yaml", "out"], ["evaluate", "./none", "none.yaml"]])
def test_other_commands_refuse_missing_files_too(command: Command, words: list[str]):
    code, _, err = command(*words)
    assert code == 2
    assert "none" in err


def test_a_recipe_with_a_density_above_one_is_refused(world: World, command: Command):
    group = {
        "layers": [0, 3],
        "modules": ["mlp"],
        "method": "ties",
        "models": {"one": {"weight": 1.0, "density": 1.3}},
    }
    recipe = {
        "evomerge_recipe": 1,
        "base_model": "base",
        "models": ["one"],
        "groups": [group],
        "sources": {"base": {"model": "base"}, "one": {"model": "one"}},
    }
    path = world.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, _, err = command("merge", path, world.folder / "out")
    assert code == 2
    assert "density is 1.3" in err
    assert not (world.folder / "out").exists()


def test_export_of_an_unfinished_run_is_refused(world: World, command: Command):
    with build.Run(build.Parts.open(build.load_config(world.run_file))):
        pass
    code, _, err = command("export", world.run_dir)
    assert code == 2
    assert "no winner yet" in err


def test_a_damaged_storage_file_is_named(world: World, command: Command, monkeypatch: pytest.MonkeyPatch):
    with build.Run(build.Parts.open(build.load_config(world.run_file))):
        pass
    (world.run_dir / "study.journal").write_text("not json\n" + json.dumps({}) + "\n", encoding="utf-8")
    code, _, err = command("status", world.run_dir)
    assert code == 2
    assert "study.journal" in err
