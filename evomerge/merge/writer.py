"""Write merged tensors as a model folder that transformers, vLLM and llama.cpp's converter load.

The folder appears under its name only when it is whole: everything is written to a hidden sibling folder,
shard by shard, and renamed at the end. A merge that was killed or met a full disk goes on at its first
missing shard when it is started again.

Imports: `evomerge.errors`, `evomerge.sources`, `evomerge.merge.shards`; torch only when tensors are written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import ExportError
from evomerge.merge.shards import SAFETENSORS_DTYPES, WIDTHS, Entry, Shard, pack, write_shard
from evomerge.sources.checkpoint import INDEX, Checkpoint, TensorInfo, read_json
from evomerge.sources.tying import mergeable

if TYPE_CHECKING:
    import torch

    # names wanted -> name and tensor, in the checkpoint's order, drawn one at a time
    Merge = Callable[[Set[str]], Iterator[tuple[str, torch.Tensor]]]

MAX_SHARD_BYTES = 5_000_000_000
SLACK_BYTES = 64 << 20  # for the tokenizer, which is tens of megabytes at most, and safetensors headers
MANIFEST = "merge.json"  # in an unfinished folder: which merge it belongs to
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


Say = Callable[[str], None]


def silent(message: str) -> None:
    """Tell nobody."""


def planned(base: Checkpoint, dtype: str | None = None) -> list[Entry]:
    """What a merge of `base` writes: its tensors, the floating ones in torch's `dtype` (None: as stored)."""
    return [planned_entry(name, base.tensors[name], dtype) for name in mergeable(base)]


def planned_entry(name: str, info: TensorInfo, dtype: str | None = None) -> Entry:
    """A tensor like `info`, in torch's `dtype` if it is floating and that is not None."""
    if dtype is None or not info.floating:
        return Entry(name, info.shape, info.dtype, info.nbytes)
    return Entry(name, info.shape, SAFETENSORS_DTYPES[dtype], info.numel * WIDTHS[dtype])


def write_model(
    folder: Path,
    entries: Sequence[Entry],
    merge: Merge,
    base_folder: Path,
    *,
    key: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: str | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
    say: Say = silent,
) -> Path:
    """Write a model folder and return it.

    Args:
        folder: does not exist, or is empty.
        entries: the tensors, in the order in which `merge` yields them.
        merge: called once, with the names of the tensors that are still missing.
        base_folder: checkpoint whose config, tokenizer, chat template and licence are copied.
        key: says what is merged; an unfinished folder with the same key and shards is gone on with.
        max_shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.
        card: text of README.md; None writes none.
        metadata: added to every safetensors header, beside `format: pt`.
        dtype: torch name of the tensors' dtype, when it is not the base's: config.json will say so.
        say: told when a merge is gone on with, and of every shard that is written.

    Raises:
        ExportError: `folder` is in use, the disk has not enough free space, or writing fails; then finished
            shards are kept for the next try, and the message says where.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"`{folder}` exists and is not an empty folder; remove it or choose another name")
    partial = folder.with_name(f".{folder.name}.partial")
    header = {"format": "pt", **(metadata or {})}
    shards = pack(entries, max_shard_bytes)
    try:
        missing = _begin(partial, shards, key, header)
        if len(missing) < len(shards):
            say(f"going on in {partial}: {len(shards) - len(missing)} of {len(shards)} shards are there")
        _check_disk(folder, sum(shard.nbytes for shard in missing) + SLACK_BYTES)
        tensors = merge({entry.name for shard in missing for entry in shard.entries})
        for shard in missing:
            write_shard(partial / shard.file, shard, tensors, header)
            say(f"wrote {shard.file}")
        for source in _copied(base_folder):
            shutil.copyfile(source, partial / source.name)
        if dtype is not None:
            _state_dtype(partial / "config.json", dtype)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if len(shards) > 1:
            _write_index(partial / INDEX, shards)
        (partial / MANIFEST).unlink()
        partial.replace(folder)
    except OSError as error:
        kept = _kept(partial, shards)
        raise ExportError(
            f"`{folder}` cannot be written ({error}); free the disk or choose another place{kept}"
        ) from error
    except ExportError as error:
        raise ExportError(f"{error}{_kept(partial, shards)}") from None
    except KeyboardInterrupt:
        _kept(partial, shards)
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _begin(partial: Path, shards: Sequence[Shard], key: str, header: Mapping[str, str]) -> list[Shard]:
    """Make the unfinished folder, or take up the one that is there; returns the shards that it lacks."""
    plan = [[shard.file, [[e.name, e.dtype, e.shape] for e in shard.entries]] for shard in shards]
    digest = hashlib.sha256(json.dumps([key, dict(header), plan]).encode()).hexdigest()
    manifest = partial / MANIFEST
    if manifest.is_file() and manifest.read_text(encoding="utf-8") == digest:
        return [shard for shard in shards if not (partial / shard.file).exists()]
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest.write_text(digest, encoding="utf-8")
    return list(shards)


def _kept(partial: Path, shards: Sequence[Shard]) -> str:
    """Drop an unfinished folder without a finished shard; otherwise say what is kept."""
    for file in partial.glob("*.partial"):
        file.unlink(missing_ok=True)
    done = sum((partial / shard.file).exists() for shard in shards)
    if not done:
        shutil.rmtree(partial, ignore_errors=True)
        return ""
    return (
        f". {done} of {len(shards)} shards are kept in `{partial}`: the same command goes on from there; "
        "remove that folder to start anew"
    )


def _write_index(path: Path, shards: Sequence[Shard]) -> None:
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(shard.nbytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
