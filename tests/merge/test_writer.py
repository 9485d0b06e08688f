"""The writer: what is read back is what was written, and nothing unfinished looks finished."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from evomerge.errors import ExportError, RecipeError
from evomerge.merge.shards import SAFETENSORS_DTYPES, Entry
from evomerge.merge.writer import write_model
from evomerge.sources.checkpoint import Checkpoint
from tests.tiny import tiny_model

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "base", tied=False)


Rows = list[tuple[str, torch.Tensor]]


def tensors_of(folder: Path) -> Rows:
    checkpoint = Checkpoint(folder)
    return [(name, checkpoint.read(name)) for name in checkpoint.tensors]


def write(
    folder: Path, rows: Rows, base: Path, during: Callable[[str], None] = lambda name: None, **options: Any
) -> Path:
    """`write_model` of tensors in memory; `during` is called when one is drawn."""

    def merge(names: Set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in rows:
            if name in names:
                during(name)
                yield name, tensor

    entries = [
        Entry(name, tuple(t.shape), SAFETENSORS_DTYPES[str(t.dtype).removeprefix("torch.")], t.nbytes)
        for name, t in rows
    ]
    return write_model(folder, entries, merge, base, **{"key": "a merge", **options})


def test_tensors_survive_bit_by_bit(base: Path, tmp_path: Path):
    folder = write(tmp_path / "out", tensors_of(base), base)
    written, expected = (load_file(path / "model.safetensors") for path in (folder, base))
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert all(written[name].dtype == expected[name].dtype for name in expected)


def test_a_transposed_tensor_is_written_in_its_own_order(base: Path, tmp_path: Path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    folder = write(tmp_path / "out", [("a", tensor)], base)
    assert torch.equal(load_file(folder / "model.safetensors")["a"], tensor)


def test_transformers_loads_the_folder_and_its_tokenizer(base: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write(tmp_path / "out", tensors_of(base), base, max_shard_bytes=50_000)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.lm_head.weight, load_file(base / "model.safetensors")["lm_head.weight"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("as written")) == "as written"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_files_beside_the_tensors_come_from_the_base(base: Path, tmp_path: Path):
    source = shutil.copytree(base, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("Apache-2.0")
    (source / "README.md").write_text("of the base")
    (source / "optimizer.pt").touch()
    folder = write(tmp_path / "out", tensors_of(source), source, card="# Merged")
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "README.md").read_text() == "# Merged"
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_metadata_says_format_and_what_the_caller_adds(base: Path, tmp_path: Path):
    folder = write(tmp_path / "out", tensors_of(base), base, metadata={"recipe": "9f3c2a"})
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "9f3c2a"}


def test_shards_keep_their_limit_and_the_index_is_right(base: Path, tmp_path: Path):
    limit = 50_000
    folder = write(tmp_path / "out", tensors_of(base), base, max_shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == Checkpoint(base).bytes
    assert all(sum(t.nbytes for t in load_file(file).values()) <= limit for file in files)
    expected = load_file(base / "model.safetensors")
    written = Checkpoint(folder)
    assert all(torch.equal(written.read(name), tensor) for name, tensor in expected.items())


def test_shards_are_filled_up_to_their_limit(base: Path, tmp_path: Path):
    rows = [(f"t{number}", torch.zeros(10)) for number in range(7)]
    folder = write(tmp_path / "out", rows, base, max_shard_bytes=3 * 40)
    assert [len(load_file(file)) for file in sorted(folder.glob("*.safetensors"))] == [3, 3, 1]


def test_a_tensor_above_the_limit_has_a_file_of_its_own(base: Path, tmp_path: Path):
    rows = [("a", torch.zeros(4)), ("b", torch.zeros(100)), ("c", torch.zeros(4))]
    folder = write(tmp_path / "out", rows, base, max_shard_bytes=40)
    assert [list(load_file(file)) for file in sorted(folder.glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


def test_tensors_are_aligned_to_their_width_whatever_the_order(base: Path, tmp_path: Path):
    rows = [
        ("half", torch.ones(3, dtype=torch.bfloat16)),
        ("flag", torch.tensor([True])),
        ("one", torch.ones(5)),
    ]
    folder = write(tmp_path / "out", rows, base)
    infos = Checkpoint(folder).tensors
    start = min(info.offset for info in infos.values())
    assert start % 8 == 0
    assert all((info.offset - start) % (info.nbytes // info.numel) == 0 for info in infos.values())
    assert all(torch.equal(load_file(folder / "model.safetensors")[name], tensor) for name, tensor in rows)


def test_each_tensor_is_on_the_disk_before_the_next_is_drawn(base: Path, tmp_path: Path):
    rows = [(f"t{number}", torch.full((100_000,), float(number))) for number in range(1, 5)]
    found = []

    def look(name: str) -> None:
        (file,) = (tmp_path / ".out.partial").glob("*.partial")
        found.append(
            sum(np.uint32(t[0].numpy().view(np.uint32)).tobytes() in file.read_bytes() for _, t in rows)
        )

    write(tmp_path / "out", rows, base, during=look)
    assert found == [0, 1, 2, 3]


def test_an_existing_model_is_not_overwritten(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an empty folder; remove it"):
        write(tmp_path / "out", tensors_of(base), base)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert (write(tmp_path / "out", tensors_of(base), base) / "config.json").exists()


def test_a_full_disk_is_said_before_anything_is_merged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    drawn: list[str] = []
    with pytest.raises(ExportError, match=r"needs [\d,]+ bytes, but its disk has 1,000 bytes free") as caught:
        write(tmp_path / "out", tensors_of(base), base, during=drawn.append)
    needed = int(str(caught.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert needed >= Checkpoint(base).bytes
    assert drawn == []
    assert list(tmp_path.iterdir()) == []


def stop_at(number: int, error: BaseException) -> Callable[[str], None]:
    """Raises when the tensor of that number is drawn."""
    drawn: list[str] = []

    def during(name: str) -> None:
        drawn.append(name)
        if len(drawn) == number:
            raise error

    return during


FOUR = [(f"t{number}", torch.full((8,), float(number))) for number in range(4)]  # 32 bytes each


@pytest.mark.parametrize("error", [RuntimeError(), RecipeError("not finite")])
def test_a_merge_that_fails_leaves_nothing(base: Path, tmp_path: Path, error: Exception):
    with pytest.raises(type(error)):
        write(tmp_path / "out", FOUR, base, during=stop_at(3, error), max_shard_bytes=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_merge_that_is_stopped_goes_on_at_its_first_missing_shard(
    base: Path, tmp_path: Path, error: BaseException
):
    with pytest.raises((KeyboardInterrupt, ExportError)):
        write(tmp_path / "out", FOUR, base, during=stop_at(3, error), max_shard_bytes=32)
    assert not (tmp_path / "out").exists()
    drawn: list[str] = []
    folder = write(tmp_path / "out", FOUR, base, during=drawn.append, max_shard_bytes=32)
    assert drawn == ["t2", "t3"]
    written = Checkpoint(folder)
    assert all(torch.equal(written.read(name), tensor) for name, tensor in FOUR)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_says_what_is_kept(base: Path, tmp_path: Path):
    full = OSError(28, "No space left on device")
    with pytest.raises(ExportError, match=r"No space left .*2 of 4 shards are kept in `.*\.out\.partial`"):
        write(tmp_path / "out", FOUR, base, during=stop_at(3, full), max_shard_bytes=32)


def test_a_full_disk_before_the_first_shard_leaves_nothing(base: Path, tmp_path: Path):
    with pytest.raises(ExportError, match=r"choose another place$"):
        write(tmp_path / "out", FOUR, base, during=stop_at(1, OSError(28, "full")), max_shard_bytes=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"key": "another"}, {"max_shard_bytes": 64}, {"metadata": {"a": "b"}}])
def test_shards_of_another_merge_are_not_used(base: Path, tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", FOUR, base, during=stop_at(3, KeyboardInterrupt()), max_shard_bytes=32)
    drawn: list[str] = []
    write(tmp_path / "out", FOUR, base, during=drawn.append, **{"max_shard_bytes": 32, **change})
    assert drawn == ["t0", "t1", "t2", "t3"]


def test_a_killed_write_leaves_no_target_and_goes_on_at_its_first_missing_shard(base: Path, tmp_path: Path):
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from tests.merge.test_writer import FOUR, write\n"
        "def during(name):\n"
        "    if name == 't2': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write(Path({str(tmp_path / 'out')!r}), FOUR, Path({str(base)!r}), during, max_shard_bytes=32)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    drawn: list[str] = []
    write(tmp_path / "out", FOUR, base, during=drawn.append, max_shard_bytes=32)
    assert drawn == ["t2", "t3"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path.name for path in (tmp_path / "out").iterdir() if "partial" in path.name]


def test_a_place_that_cannot_be_written_is_an_export_error(base: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / "file" / "out", tensors_of(base), base)
