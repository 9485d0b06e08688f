"""Checkpoints: headers against safetensors itself, and every broken folder refused by name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import SourceError
from evomerge.sources.checkpoint import Checkpoint
from tests.tiny import tiny_adapter, tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "whole", tied=False)


def shard(source: Path, folder: Path) -> dict[str, str]:
    """Write `source` to `folder` as two shards; returns the weight map."""
    tensors = load_file(source / "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_headers_agree_with_safetensors(whole: Path):
    checkpoint = Checkpoint(whole)
    tensors = load_file(whole / "model.safetensors")
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.nbytes, info.dtype) == (tuple(tensor.shape), tensor.nbytes, "BF16")
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert checkpoint.bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_read_as_the_whole(whole: Path, tmp_path: Path):
    shard(whole, tmp_path / "sharded")
    checkpoint = Checkpoint(tmp_path / "sharded")
    tensors = load_file(whole / "model.safetensors")
    assert set(checkpoint.tensors) == set(tensors)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_the_hash_is_that_of_the_files_in_order(whole: Path, tmp_path: Path):
    weight_map = shard(whole, tmp_path / "sharded")
    data = b"".join((tmp_path / "sharded" / file).read_bytes() for file in sorted(set(weight_map.values())))
    assert Checkpoint(tmp_path / "sharded").sha256() == hashlib.sha256(data).hexdigest()


def test_opening_imports_no_torch(whole: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "adapter", whole)
    code = (
        "import sys\n"
        "from evomerge.sources.reference import SourceRef\n"
        "from evomerge.sources.source_set import SourceSet\n"
        f"refs = {{'a': SourceRef(model={str(whole)!r}), 'b': SourceRef(adapter={str(adapter)!r})}}\n"
        f"SourceSet.open(SourceRef(model={str(whole)!r}), refs).describe()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("keep", [4, 100, -1])  # in the length, in the header, in the data
def test_a_truncated_file_is_refused(whole: Path, tmp_path: Path, keep: int):
    data = (whole / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(
        SourceError, match=r"model\.safetensors` is truncated: it has \d+ bytes.*copy it again"
    ):
        Checkpoint(tmp_path)


def test_bytes_after_the_data_are_refused(whole: Path, tmp_path: Path):
    data = (whole / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data + b"x")
    with pytest.raises(SourceError, match=rf"has {len(data) + 1} bytes, its header says {len(data)}"):
        Checkpoint(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello")
    with pytest.raises(SourceError, match=r"is not a safetensors file"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(whole: Path, tmp_path: Path):
    shard(whole, tmp_path / "sharded")
    (tmp_path / "sharded" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"shard `.*model-00002-of-00002\.safetensors` does not exist"):
        Checkpoint(tmp_path / "sharded")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(whole: Path, tmp_path: Path):
    weight_map = shard(whole, tmp_path / "sharded")
    weight_map["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        SourceError, match=r"`model\.extra\.weight` is in `model-00001-of-00002\.safetensors`"
    ):
        Checkpoint(tmp_path / "sharded")


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        SourceError, match=r"holds `pytorch_model\.bin` but no safetensors.*`save_pretrained`"
    ):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"holds neither `model\.safetensors` nor"):
        Checkpoint(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path):
    with pytest.raises(SourceError, match=r"config\.json` does not exist"):
        Checkpoint(tmp_path)


def test_an_adapter_given_as_a_model_is_named(whole: Path, tmp_path: Path):
    adapter = tiny_adapter(tmp_path / "adapter", whole)
    with pytest.raises(SourceError, match="holds a LoRA adapter and no model; give it as `adapter:`"):
        Checkpoint(adapter)


def test_a_quantized_model_is_refused(tmp_path: Path):
    folder = tiny_model(tmp_path / "model", config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(SourceError, match="is quantized"):
        Checkpoint(folder)


def test_a_config_that_is_not_json_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(SourceError, match=r"config\.json` cannot be read as JSON"):
        Checkpoint(tmp_path)
