"""What the README shows is run: its Python example, its YAML, and the commands that it names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from evomerge.config import RunConfig
from evomerge.evaluate.task import SuiteSection
from tests.conftest import Command
from tests.world import World

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_example_runs(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (example,) = blocks("python")
    shutil.copy(world.run_file, world.folder / "run.yaml")
    monkeypatch.chdir(world.folder)
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "the winner leads by" in printed


def test_the_run_file_shown_is_valid():
    RunConfig.model_validate(yaml.safe_load(blocks("yaml")[0]))


def test_the_task_file_shown_is_valid():
    SuiteSection.model_validate(yaml.safe_load(blocks("yaml")[1]))


def test_every_command_shown_exists(command: Command):
    text = README.read_text(encoding="utf-8")
    for name in set(re.findall(r"`evomerge (\w+)", text)):
        assert command(name, "--help")[0] == 0, name
