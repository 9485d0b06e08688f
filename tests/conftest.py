"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.world import World, make_sources, make_world, run_cli

Command = Callable[..., tuple[int, str, str]]
HERE = Path(__file__).parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """Where tests are shared out over processes, a file stays whole, and parity's share a run of mergekit."""
    if item.path.is_relative_to(HERE):
        path = item.path.relative_to(HERE)
        item.add_marker(pytest.mark.xdist_group(path.parts[0] if path.parts[0] == "parity" else str(path)))


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, made once; tests get copies."""
    folder = tmp_path_factory.mktemp("tiny")
    make_sources(folder)
    return folder


@pytest.fixture
def world(tmp_path: Path, tiny_sources: Path) -> World:
    """A small run that works; break one thing and see what it says."""
    return make_world(tmp_path, tiny_sources)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs one command line: `code, out, err = command("search", path)`."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: run_cli(capsys, monkeypatch, *words)
