"""What `--mergekit-rng` refuses; that it has mergekit's bits is shown in tests/parity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evomerge.errors import ConfigError, RecipeError
from evomerge.export.mergekit_merge import merge_mergekit
from evomerge.model import merge_model
from tests.conftest import Command
from tests.export.conftest import weights_of
from tests.tiny import tiny_adapter, tiny_model

FILE = """
merge_method: dare_linear
base_model: {home}/base
models: [{{model: {home}/tuned, parameters: {{weight: 1.0, density: 0.5}}}}]
dtype: float32
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    base = tiny_model(tmp_path / "base", hidden=32)
    tiny_model(tmp_path / "tuned", 1, noise_from=base)
    path = tmp_path / "file.yaml"
    path.write_text(FILE.format(home=tmp_path))
    return path


def test_the_seed_decides_the_masks(file: Path, tmp_path: Path):
    one, again, other = (
        weights_of(merge_mergekit(file, tmp_path / name, mergekit_rng=seed))
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_a_stopped_merge_goes_on_with_the_same_masks(file: Path, tmp_path: Path):
    whole = weights_of(merge_mergekit(file, tmp_path / "whole", mergekit_rng=3))
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_mergekit(file, tmp_path / "out", mergekit_rng=3, max_shard_bytes=20_000, say=stop)
    out = merge_mergekit(file, tmp_path / "out", mergekit_rng=3, max_shard_bytes=20_000, say=lines.append)
    assert any("going on" in line for line in lines)
    resumed = weights_of(out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_global_generator_is_left_alone(file: Path, tmp_path: Path):
    before = torch.get_rng_state()
    merge_mergekit(file, tmp_path / "out", mergekit_rng=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("line", "got"), [("dtype: bfloat16", "bfloat16"), ("out_dtype: float32", "not given")]
)
def test_another_dtype_than_float32_is_refused(file: Path, tmp_path: Path, line: str, got: str):
    file.write_text(file.read_text().replace("dtype: float32", line))
    with pytest.raises(RecipeError, match=rf"file\.yaml: `dtype` is {got}.*write `dtype: float32`"):
        merge_mergekit(file, tmp_path / "out", mergekit_rng=3)


def test_a_file_without_masks_is_refused(file: Path, tmp_path: Path):
    text = file.read_text().replace("dare_linear", "ties")
    file.write_text(text)
    with pytest.raises(RecipeError, match="no document draws random masks; leave `--mergekit-rng` out"):
        merge_mergekit(file, tmp_path / "out", mergekit_rng=3)


def test_an_adapter_is_refused(file: Path, tmp_path: Path):
    tiny_adapter(tmp_path / "lora", tmp_path / "base")
    file.write_text(file.read_text().replace("/tuned", f"/tuned+{tmp_path}/lora"))
    with pytest.raises(RecipeError, match=r"has an adapter.*merge the adapter into a model of its own first"):
        merge_mergekit(file, tmp_path / "out", mergekit_rng=3)


def test_a_recipe_of_ours_has_masks_of_its_own(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("evomerge_recipe: 1\n")
    with pytest.raises(ConfigError, match="is a recipe of evomerge, whose masks are its own"):
        merge_model(tmp_path / "recipe.yaml", tmp_path / "out", mergekit_rng=3)


def test_the_command_takes_the_seed(command: Command, file: Path, tmp_path: Path):
    code, _, err = command("merge", str(file), str(tmp_path / "out"), "--mergekit-rng", "3")
    assert code == 0, err
    written = weights_of(tmp_path / "out")
    again = weights_of(merge_mergekit(file, tmp_path / "again", mergekit_rng=3))
    assert all(torch.equal(written[name], again[name]) for name in written)
