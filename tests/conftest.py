"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.world import World, make_sources, make_world, run_cli

Command = Callable[..., tuple[int, str, str]]


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
