"""Write merged tensors as a model folder that transformers, vLLM and llama.cpp's converter load.

The folder appears under its name only when it is whole: everything is written to a hidden sibling folder and
renamed at the end. At most one shard is in memory.

Imports: `evomerge.errors`, `evomerge.sources`; torch only when tensors are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from evomerge.errors import ExportError
from evomerge.sources.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from evomerge.sources.tying import mergeable

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5_000_000_000
SLACK_BYTES = 64 << 20  # for the tokenizer, which is tens of megabytes at most, and safetensors headers
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes per entry
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",  # models that bring their own code name it in config.json
    "LICENSE*",
    "NOTICE*",
)


def write_model(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    base_folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: str | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a model folder and return it.

    Args:
        folder: does not exist, or is empty.
        tensors: name and tensor, any device and dtype, drawn one at a time; the order decides the shards.
        base_folder: checkpoint whose config, tokenizer, chat template and licence are copied.
        max_shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.
        card: text of README.md; None writes none.
        metadata: added to every safetensors header, beside `format: pt`.
        dtype: torch name of the tensors' dtype, when it is not the base's: config.json will say so.

    Raises:
        ExportError: `folder` is in use, the disk has not enough free space for a model of the base's size,
            or writing fails; then nothing is left.
        SourceError: `base_folder` is no checkpoint.
    """
    base = Checkpoint(base_folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"`{folder}` exists and is not an empty folder; remove it or choose another name")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a write that was killed
        _check_disk(folder, _bytes(base, dtype) + SLACK_BYTES)
        partial.mkdir()
        _write_tensors(partial, tensors, max_shard_bytes, {"format": "pt", **(metadata or {})})
        for source in _copied(base_folder):
            shutil.copyfile(source, partial / source.name)
        if dtype is not None:
            _state_dtype(partial / "config.json", dtype)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"`{folder}` cannot be written ({error}); free the disk or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _bytes(base: Checkpoint, dtype: str | None) -> int:
    """Size of a merge of `base`, its floating tensors in `dtype`; None: in their own."""
    infos = [base.tensors[name] for name in mergeable(base)]
    return sum(info.numel * WIDTHS[dtype] if dtype and info.floating else info.nbytes for info in infos)


def _state_dtype(path: Path, dtype: str) -> None:
    """Put `dtype` wherever config.json names one; models with several towers name one for each."""
    config = read_json(path)
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in section or (section is config and key == "dtype"):
                section[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ExportError(
            f"`{folder}` needs {needed:,} bytes, but its disk has {free:,} bytes free; "
            "free the disk or choose another place"
        )


def _copied(base_folder: Path) -> list[Path]:
    files = {path for pattern in COPIED for path in base_folder.glob(pattern) if path.is_file()}
    return sorted(files)


def _write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
    metadata: Mapping[str, str],
) -> None:
    """One `model.safetensors`, or numbered shards and their index: the count is known only at the end."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            shards.append(_save(shard, folder / f"{len(shards)}.part", metadata))
            shard.clear()
            size = 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_save(shard, folder / f"{len(shards)}.part", metadata))
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(shard: dict[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> list[str]:
    """Write one file and return the names in it."""
    from safetensors.torch import save_file

    save_file(shard, path, dict(metadata))
    return list(shard)
