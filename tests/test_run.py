"""A whole run through the command line, on tiny models: search, resume, prove, export, merge, evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evomerge
from evomerge.errors import EngineError, HeldOutError, RunDirError
from evomerge.evaluate.items import Item, Split
from evomerge.evaluate.task import Suite
from evomerge.study.storage import JOURNAL, TrialLog
from evomerge.study.study import Observer, Study
from tests.conftest import Command
from tests.world import World, make_world


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_sources: Path) -> World:
    """A finished run; tests only read it."""
    world = make_world(tmp_path_factory.mktemp("finished"), tiny_sources)
    evomerge.run_search(world.run_file)
    return world


def trials(world: World) -> list[tuple[str, str, str, float | None]]:
    log = TrialLog(str(world.run_dir / JOURNAL), "tiny")
    found = [(t.stage, t.label, t.digest, t.fitness) for t in log]
    log.close()
    return found


def test_a_run_leaves_recipes_outcome_log_and_items(finished: World):
    names = {str(p.relative_to(finished.run_dir)) for p in finished.run_dir.rglob("*") if p.is_file()}
    assert {"best/recipe.yaml", "best/mergekit.yaml", "outcome.md", "outcome.json", JOURNAL} <= names
    assert any(name.startswith("items/calibration/") for name in names)
    assert any(name.startswith("items/held_out/") for name in names)


def test_the_outcome_compares_the_winner_with_every_source_and_fixed_recipe(finished: World):
    outcome = json.loads((finished.run_dir / "outcome.json").read_text(encoding="utf-8"))
    labels = [entry["label"] for entry in outcome["entries"]]
    assert labels[0] == outcome["winner"]
    assert {"base", "one", "two", "lora", "uniform average", "one+two 0.5"} <= set(labels)
    assert all(entry["held_out"] is not None for entry in outcome["entries"])


def test_fixed_recipes_come_first_then_the_stages_in_their_order(finished: World):
    stages = [stage for stage, *_ in trials(finished)]
    assert list(dict.fromkeys(stages)) == ["fixed", "1:global", "2:modules"]
    assert len(stages) == 34


def test_the_first_line_of_the_outcome_says_whether_the_gain_is_significant(finished: World):
    first = (finished.run_dir / "outcome.md").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(("Significant gain", "Not significant", "No gain"))


def test_merging_the_winners_recipe_gives_what_the_engine_held(finished: World, tmp_path: Path):
    """Promise 1 through the files: recipe.yaml -> model folder -> the same scores item by item."""
    recipe = finished.run_dir / "best" / "recipe.yaml"
    folder = evomerge.merge_model(recipe, tmp_path / "model")
    suite = finished.folder / "suite.yaml"
    from_recipe = evomerge.evaluate_model(recipe, suite, device="cpu")
    from_folder = evomerge.evaluate_model(folder, suite, device="cpu")
    assert from_recipe == from_folder
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["scores"]["selection"] == pytest.approx(
        from_folder[1], abs=1e-6
    )


def test_a_mergekit_file_is_scored_as_the_folder_that_it_merges_to(finished: World, tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_text(
        f"merge_method: ties\nbase_model: {finished.folder / 'base'}\nmodels:\n"
        f"- {{model: {finished.folder / 'one'}, parameters: {{weight: [0.9, 0.2]}}}}\n"
        f"- {{model: {finished.folder / 'two'}, parameters: {{weight: 0.6}}}}\n"
        "parameters: {density: 0.5}\n"
    )
    suite = finished.folder / "suite.yaml"
    folder = evomerge.merge_model(path, tmp_path / "model")
    assert evomerge.evaluate_model(path, suite, device="cpu") == evomerge.evaluate_model(
        folder, suite, device="cpu"
    )


def test_export_writes_the_winner_as_a_model_folder(finished: World, command: Command, tmp_path: Path):
    target = tmp_path / "winner"
    code, out, err = command("export", finished.run_dir, "--model", "--out", target)
    assert code == 0, err
    assert str(target) in out
    assert (target / "tokenizer.json").exists()
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "held-out" in card
    assert "evomerge_recipe: 1" in card
    base = load_file(finished.folder / "base" / "model.safetensors")
    merged = load_file(target / "model.safetensors")
    assert merged.keys() == base.keys()


def test_status_reads_a_finished_run(finished: World, command: Command):
    code, out, _ = command("status", finished.run_dir, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["state"] == "finished"
    assert facts["trials"] == 34
    assert "34 complete" not in command("status", finished.run_dir)[1], "screened recipes are not complete"


def test_a_finished_run_is_shown_again_without_evaluating_anything(
    finished: World, command: Command, monkeypatch: pytest.MonkeyPatch
):
    from evomerge.engine.transformers_engine import TransformersEngine

    def refuse(*args: object) -> None:
        raise AssertionError("an item was asked again")

    monkeypatch.setattr(TransformersEngine, "generate", refuse)
    code, out, err = command("resume", finished.run_dir, "--json")
    assert code == 0, err
    assert json.loads(out)["winner"]


def test_evaluate_prints_scores_by_task(finished: World, command: Command):
    base, suite = finished.folder / "base", finished.folder / "suite.yaml"
    code, out, err = command("evaluate", base, suite, "--limit", 3, "--device", "cpu", "--json")
    assert code == 0, err
    scores = json.loads(out)
    assert {task: row["n"] for task, row in scores["tasks"].items()} == {"letter": 3, "text": 3}


def test_check_tells_space_disk_memory_and_seconds(world: World, command: Command):
    code, out, err = command("check", world.run_file, "--json")
    assert code == 0, err
    facts = json.loads(out)
    # attention and mlp for three models; the rest for two, because the adapter leaves it alone
    assert facts["stages"] == {"1:global": "3 parameters", "2:modules": "8 parameters"}
    assert "seconds per candidate" in facts
    assert not world.run_dir.exists()


def test_init_writes_a_file_that_check_can_read(tmp_path: Path, command: Command):
    path = tmp_path / "new.yaml"
    assert command("init", path)[0] == 0
    code, _, err = command("check", path)
    assert code == 2
    assert "fitness.yaml" in err, "only the placeholders are wrong"


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    world: World, finished: World, signal_number: signal.Signals
):
    """Promise 2, with a real process: the trials are those of the run that nobody stopped."""
    # Whoever runs the tests in the background may have made the shell ignore SIGINT, and children inherit it.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from evomerge.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "search", str(world.run_file)]
    journal = world.run_dir / JOURNAL
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > 25:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal_number)
        _, err = process.communicate()
    assert process.returncode == (-signal.SIGKILL if signal_number == signal.SIGKILL else 130), err
    before = trials(world)
    assert 0 < len(before) < 34
    evomerge.resume_search(world.run_dir)
    assert trials(world)[: len(before)] == before
    assert trials(world) == trials(finished)


def test_a_stopped_run_may_go_on_with_another_batch_size(world: World, monkeypatch: pytest.MonkeyPatch):
    """The message for an accelerator that is out of memory asks for a smaller one."""
    from evomerge.engine.transformers_engine import TransformersEngine

    def broken(*args: object) -> None:
        raise EngineError("out of memory while generating; lower `engine.batch_tokens`")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", broken)
        with pytest.raises(EngineError, match=r"lower `engine.batch_tokens`"):
            evomerge.run_search(world.run_file)
    world.run["engine"]["batch_tokens"] = 64
    world.run["budget"]["trials"] = 34
    world.write()
    assert evomerge.resume_search(world.run_dir).winner.held_out is not None


def test_a_new_run_does_not_take_over_another_runs_study(world: World, tmp_path: Path):
    world.run["storage"] = f"sqlite:///{tmp_path}/shared.db"
    world.run["budget"]["trials"] = 20
    world.write()
    evomerge.run_search(world.run_file)
    world.run["run_dir"] = "./elsewhere"
    world.write()
    with pytest.raises(RunDirError, match="the study `tiny` is there already, but this run is new"):
        evomerge.run_search(world.run_file)


def test_held_out_items_raise_when_the_search_reads_them(world: World, monkeypatch: pytest.MonkeyPatch):
    """Promise 3: reading them is an error while the search runs, and the search does not."""
    tried = []

    class Curious(Observer):
        def trial(self, study: Study, trial: object) -> None:
            with pytest.raises(HeldOutError):
                study.suite.items("letter", "held_out")
            tried.append(trial)

    reads = []
    plain = Suite.items

    def recorded(self: Suite, task: str, split: Split) -> tuple[Item, ...]:
        reads.append(split)
        return plain(self, task, split)

    monkeypatch.setattr(Suite, "items", recorded)
    result = evomerge.run_search(world.run_file, observer=Curious())
    assert len(tried) == 34
    assert result.winner.held_out is not None
    last_search = max(i for i, split in enumerate(reads) if split == "calibration")
    assert "held_out" in reads[last_search:]


def test_a_candidate_whose_weights_are_not_finite_is_infeasible_and_the_run_goes_on(world: World):
    space = {"methods": ["task_arithmetic"], "parameters": {"weight": {"low": 1e39, "high": 1e40}}}
    world.run["search"]["stages"] = [{"space": space}]
    world.run["budget"]["trials"] = 26
    world.write()
    evomerge.run_search(world.run_file)
    log = TrialLog(str(world.run_dir / JOURNAL), "tiny")
    searched = [t for t in log if t.stage != "fixed"]
    log.close()
    assert searched
    assert {t.outcome.value for t in searched} == {"infeasible"}
    assert "finite" in searched[0].error


def test_a_machine_that_fails_again_and_again_ends_the_run_and_loses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    from evomerge.engine.transformers_engine import TransformersEngine

    loads = []
    plain = TransformersEngine.load

    def failing(self: TransformersEngine, recipe: evomerge.Recipe) -> object:
        loads.append(recipe)
        if len(loads) > 20:
            raise EngineError("out of memory while merging")
        return plain(self, recipe)

    monkeypatch.setattr(TransformersEngine, "load", failing)
    with pytest.raises(EngineError, match=r"the last 5 trials failed.*evomerge resume"):
        evomerge.run_search(world.run_file)
    kept = trials(world)
    assert len(kept) == 25
    monkeypatch.setattr(TransformersEngine, "load", plain)
    evomerge.resume_search(world.run_dir)
    assert trials(world)[:25] == kept


def test_a_full_model_and_an_adapter_of_the_same_change_merge_alike(world: World, tmp_path: Path):
    """An adapter as a task vector equals the adapter merged into a checkpoint, to one bf16 step."""
    adapter = {
        "evomerge_recipe": 1,
        "base_model": "base",
        "models": ["lora"],
        "groups": [
            {
                "layers": [0, 3],
                "modules": ["attention", "mlp"],
                "method": "task_arithmetic",
                "models": {"lora": {"weight": 1.0}},
            }
        ],
        "sources": {"base": {"model": "./base"}, "lora": {"adapter": "./adapter"}},
    }
    path = world.folder / "adapter.yaml"
    path.write_text(yaml.safe_dump(adapter), encoding="utf-8")
    ours = load_file(evomerge.merge_model(path, tmp_path / "ours") / "model.safetensors")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(world.folder / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(world.folder / "adapter")).merge_and_unload().state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, merged[name].to(tensor.dtype), rtol=2**-7, atol=1e-6)
