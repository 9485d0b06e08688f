"""What a person sees of a run: the line, the stages, the log file, the last words on Ctrl-C."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from evomerge import cli, live
from evomerge.live import LiveObserver
from tests.conftest import Command
from tests.world import World


@pytest.fixture
def short(world: World) -> World:
    """A run of few trials."""
    world.run["budget"] = {"trials": 24}
    world.write()
    return world


def test_a_run_names_its_stages_and_ends_with_the_outcome(short: World, command: Command):
    code, out, err = command("search", short.run_file)
    assert code == 0, err
    assert "fixed recipes: " in err
    assert "stage 1:global: 3 parameters, cma" in err
    assert "held-out items" in out.splitlines()[0]
    assert "recipe.yaml" in out


def test_every_trial_is_in_the_log_file(short: World, command: Command):
    command("search", short.run_file)
    log = (short.run_dir / live.LOG).read_text(encoding="utf-8")
    assert all(f"trial {number} " in log for number in range(24))


def test_an_error_that_ends_a_run_is_in_the_log_file(
    short: World, command: Command, monkeypatch: pytest.MonkeyPatch
):
    from evomerge.engine.transformers_engine import TransformersEngine
    from evomerge.errors import EngineError

    def broken(*args: object) -> None:
        raise EngineError("out of memory while merging")

    monkeypatch.setattr(TransformersEngine, "load", broken)
    code, _, err = command("search", short.run_file)
    assert code == 2
    assert "Traceback" not in err
    assert "EngineError" in (short.run_dir / live.LOG).read_text(encoding="utf-8")


def test_without_a_terminal_lines_are_printed_now_and_then(
    short: World, command: Command, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live, "QUIET_SECONDS", 0.0)
    _, _, err = command("search", short.run_file)
    lines = [line for line in err.splitlines() if "items/s" in line]
    assert len(lines) >= 20
    assert "best " in lines[-1]
    assert "% of the search" in lines[-1]


def test_on_a_terminal_the_line_is_redrawn(tmp_path: Path):
    stream = io.StringIO()
    with LiveObserver(Console(file=stream, force_terminal=True, width=80), tmp_path) as observer:
        assert observer._live is not None
    assert observer._live.is_started is False


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stop)
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 130
    assert "evomerge resume" in capsys.readouterr().err
