"""Every recipe of the parity tests is drawn once and goes through mergekit once, all in one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from evomerge.errors import ExportError
from evomerge.export.bundle import base_dtype
from evomerge.export.mergekit import mergekit_documents, mergekit_text, places
from evomerge.merge.methods import SPECS
from tests.export.conftest import weights_of
from tests.mergekit import run_mergekit
from tests.parity.compare import COUNTS, Tensors
from tests.parity.families import Home
from tests.parity.files import METHODS, File, drawn, several, single
from tests.parity.oracle import command
from tests.parity.recipes import DrawnRecipe, recipe
from tests.threads import one_thread as one_thread

ROUNDS = int(os.environ.get("EVOMERGE_PARITY", "1"))  # of every method; `make parity` asks for more
SEED = 11  # of mergekit's masks
FILES = [f"{method}-{i}" for method in (*METHODS, "several") for i in range(ROUNDS)]
RECIPES = [f"{method}-{i}" for method in METHODS for i in range(ROUNDS)]
# Written by hand: what mergekit refuses, or takes without a word (test_defects.py)
PLAIN: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [{"model": "near", "parameters": {"weight": 0.5}}],
    "dtype": "float32",
}
ADAPTED = [{"model": "base+lora", "parameters": {"weight": 0.5}}]
THREE = [{"model": name} for name in ("near", "parts", "far")]
HAND = {
    "plain": File("llama-f32", [PLAIN]),
    "mistyped": File("llama-f32", [{**PLAIN, "parameters": {"lamda": 2.0}}]),
    "edge": File("llama-f32", [{**PLAIN, "merge_method": "della", "parameters": {"density": 0.9}}]),
    "neox_adapter": File("neox-f32", [{**PLAIN, "models": ADAPTED}]),
    "unchanged": File(
        "neox-f32", [{**PLAIN, "merge_method": "multislerp", "models": THREE, "parameters": {"weight": 1.0}}]
    ),
    "neox_della": File("neox-f32", [{**PLAIN, "merge_method": "della", "parameters": {"density": 0.5}}]),
}


class Case(NamedTuple):
    """One file that went through mergekit.

    Attributes:
        drawn: what it was made of.
        family: name of its models' family.
        path: the file.
        refused: what our export said instead of writing it.
    """

    drawn: File | DrawnRecipe
    family: str
    path: Path
    refused: str = ""

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def error(self) -> str:
        """What mergekit raised, if it did."""
        file = self.path.with_name("error.txt")
        return file.read_text() if file.exists() else ""

    @property
    def theirs(self) -> Tensors:
        assert not self.error, f"mergekit: {self.error[-2000:]}\n{self.text}"
        return weights_of(self.path.with_name("OUT"))


class World(NamedTuple):
    """All cases: `file/NAME`, `recipe/NAME` and `hand/NAME`."""

    home: Home
    cases: dict[str, Case]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    pytest.importorskip("mergekit", reason="mergekit is the reference of these tests")
    folder = tmp_path_factory.mktemp("parity")
    home = Home(folder / "families")
    cases: dict[str, Case] = {}
    for index, method in enumerate((*METHODS, "several")):
        strategy = several() if method == "several" else single(method)
        for i, file in enumerate(drawn(strategy, ROUNDS, index)):
            name = f"file/{method}-{i}"
            cases[name] = _file_case(file, folder / name, home)
    for index, method in enumerate(METHODS):
        for i, example in enumerate(drawn(recipe(method), ROUNDS, 1000 + index)):
            name = f"recipe/{method}-{i}"
            cases[name] = _recipe_case(example, folder / name, home)
    for name, file in HAND.items():
        cases[f"hand/{name}"] = _file_case(file, folder / "hand" / name, home)
    commands = {
        case.path.parent: command(
            case.path.parent, len(list(yaml.safe_load_all(case.text))), folder / "adapted", SEED
        )
        for case in cases.values()
        if not case.refused
    }
    run_mergekit(commands, folder)
    return World(home, cases)


def _file_case(file: File, folder: Path, home: Home) -> Case:
    folder.mkdir(parents=True)
    path = folder / "file.yaml"
    documents = [_placed(document, file.family, home) for document in file.documents]
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return Case(file, file.family, path)


def _placed(document: dict[str, Any], family: str, home: Home) -> dict[str, Any]:
    """The document with folders for the models' names."""
    rows = [{**row, "model": home.place(family, row["model"])} for row in document["models"]]
    base = {key: home.place(family, value) for key, value in document.items() if key == "base_model"}
    return {**document, **base, "models": rows}


def _recipe_case(example: DrawnRecipe, folder: Path, home: Home) -> Case:
    folder.mkdir(parents=True)
    sources = home.sources(example.family)
    path = folder / "file.yaml"
    try:
        documents = mergekit_documents(
            example.recipe, sources.layout(), SPECS, places(sources), base_dtype(sources)
        )
    except ExportError as error:
        path.write_text("")
        return Case(example, example.family, path, str(error))
    path.write_text(mergekit_text(documents, SPECS))
    return Case(example, example.family, path)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many entries were compared, by class, and how many differ."""
    if COUNTS:
        terminalreporter.section("parity with mergekit 0.1.5")
        for name, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{name}: {count:,} entries")
