"""Shared by the tests of export: families of tiny models, and the real mergekit in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests.mergekit import run_mergekit
from tests.tiny import tiny_adapter, tiny_model


@pytest.fixture(scope="session")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[Path, str]], None]:
    """`mergekit({folder: command})`: run command lines of mergekit, each in its folder."""
    pytest.importorskip("mergekit", reason="mergekit is the reference of these tests")
    home = tmp_path_factory.mktemp("mergekit")

    def run(commands: Mapping[Path, str]) -> None:
        run_mergekit(commands, home)
        failed = [folder / "error.txt" for folder in commands if (folder / "error.txt").exists()]
        assert not failed, failed[0].read_text()

    return run


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    """A bfloat16 base of four layers with tied embeddings; two near experts, a distant one, an adapter."""
    home = tmp_path_factory.mktemp("family")
    base = tiny_model(home / "base", layers=4)
    return SourceSet.open(
        SourceRef(model=str(base)),
        {
            "math": SourceRef(model=str(tiny_model(home / "math", 1, noise_from=base))),
            "code": SourceRef(model=str(tiny_model(home / "code", 2, noise_from=base))),
            "far": SourceRef(model=str(tiny_model(home / "far", 3, noise_from=base, noise=0.1))),
            "lora": SourceRef(adapter=str(tiny_adapter(home / "lora", base, 4))),
            # a name that mergekit's short form of a model reference would cut in two
            "odd": SourceRef(adapter=str(tiny_adapter(home / "v1+x@y", base, 5, targets=("o_proj",)))),
        },
    )


@pytest.fixture(scope="session")
def exact_family(tmp_path_factory: pytest.TempPathFactory) -> SourceSet:
    """A float32 base of three layers with its own output head; magnitudes do not repeat."""
    home = tmp_path_factory.mktemp("exact")
    base = tiny_model(home / "base", 7, tied=False, dtype=torch.float32, layers=3)
    return SourceSet.open(
        SourceRef(model=str(base)),
        {
            "math": SourceRef(model=str(tiny_model(home / "math", 8, noise_from=base))),
            "code": SourceRef(model=str(tiny_model(home / "code", 9, noise_from=base))),
            "far": SourceRef(model=str(tiny_model(home / "far", 10, noise_from=base, noise=0.1))),
        },
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
