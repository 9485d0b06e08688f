"""The writer: what is read back is what was written, and nothing unfinished looks finished."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import weakref
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from evomerge.errors import ExportError
from evomerge.merge.writer import write_model
from evomerge.sources.checkpoint import Checkpoint
from tests.tiny import tiny_model

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "base", tied=False)


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    checkpoint = Checkpoint(folder)
    for name in checkpoint.tensors:
        yield name, checkpoint.read(name)


def test_tensors_survive_bit_by_bit(base: Path, tmp_path: Path):
    folder = write_model(tmp_path / "out", tensors_of(base), base)
    written, expected = (load_file(path / "model.safetensors") for path in (folder, base))
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert all(written[name].dtype == expected[name].dtype for name in expected)


def test_a_transposed_tensor_is_written_in_its_own_order(base: Path, tmp_path: Path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    folder = write_model(tmp_path / "out", [("a", tensor)], base)
    assert torch.equal(load_file(folder / "model.safetensors")["a"], tensor)


def test_transformers_loads_the_folder_and_its_tokenizer(base: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_model(tmp_path / "out", tensors_of(base), base, max_shard_bytes=50_000)
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
    folder = write_model(tmp_path / "out", tensors_of(source), source, card="# Merged")
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
    folder = write_model(tmp_path / "out", tensors_of(base), base, metadata={"recipe": "9f3c2a"})
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": "9f3c2a"}


def test_shards_keep_their_limit_and_the_index_is_right(base: Path, tmp_path: Path):
    limit = 50_000
    folder = write_model(tmp_path / "out", tensors_of(base), base, max_shard_bytes=limit)
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
    folder = write_model(tmp_path / "out", rows, base, max_shard_bytes=3 * 40)
    assert [len(load_file(file)) for file in sorted(folder.glob("*.safetensors"))] == [3, 3, 1]


def test_a_tensor_above_the_limit_has_a_file_of_its_own(base: Path, tmp_path: Path):
    rows = [("a", torch.zeros(4)), ("b", torch.zeros(100)), ("c", torch.zeros(4))]
    folder = write_model(tmp_path / "out", rows, base, max_shard_bytes=40)
    assert [list(load_file(file)) for file in sorted(folder.glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


def test_at_most_one_shard_is_in_memory(base: Path, tmp_path: Path):
    drawn: list[weakref.ref[np.ndarray]] = []
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(12):
            data = np.full(10, number, dtype=np.float32)  # lives as long as a tensor that shares its memory
            drawn.append(weakref.ref(data))
            most = max(most, sum(ref() is not None for ref in drawn))
            yield f"t{number}", torch.from_numpy(data)

    write_model(tmp_path / "out", stream(), base, max_shard_bytes=3 * 40)
    assert most == 4  # a shard of three, and the tensor that does not fit any more


def test_an_existing_model_is_not_overwritten(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an empty folder; remove it"):
        write_model(tmp_path / "out", tensors_of(base), base)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(base: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert (write_model(tmp_path / "out", tensors_of(base), base) / "config.json").exists()


def test_a_full_disk_is_said_before_anything_is_merged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    drawn: list[str] = []
    rows = ((drawn.append(name), (name, tensor))[1] for name, tensor in tensors_of(base))
    with pytest.raises(ExportError, match=r"needs [\d,]+ bytes, but its disk has 1,000 bytes free") as caught:
        write_model(tmp_path / "out", rows, base)
    needed = int(str(caught.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert needed >= Checkpoint(base).bytes
    assert drawn == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_stops_half_way_leaves_nothing(base: Path, tmp_path: Path, kind: type[BaseException]):
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number, row in enumerate(tensors_of(base)):
            if number == 10:
                raise kind
            yield row

    with pytest.raises(kind):
        write_model(tmp_path / "out", stream(), base, max_shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_no_target_and_the_next_one_succeeds(base: Path, tmp_path: Path):
    code = (
        "import os, signal, torch\n"
        "from pathlib import Path\n"
        "from evomerge.merge.writer import write_model\n"
        "def stream():\n"
        "    yield 'a', torch.zeros(4)\n"
        "    yield 'b', torch.zeros(4)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_model(Path({str(tmp_path / 'out')!r}), stream(), Path({str(base)!r}), max_shard_bytes=16)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    write_model(tmp_path / "out", tensors_of(base), base)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_place_that_cannot_be_written_is_an_export_error(base: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="cannot be written"):
        write_model(tmp_path / "file" / "out", tensors_of(base), base)
