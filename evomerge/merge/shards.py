"""Safetensors files written tensor by tensor, so that no shard is ever in memory.

What a merge will write is known before it starts, so a file's header comes first and every tensor goes to its
place as it arrives (format: https://github.com/huggingface/safetensors). A file has its name only when it is
whole.

Imports: `evomerge.sources.checkpoint`; torch only when tensors are written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.sources.checkpoint import SINGLE, TORCH_DTYPES

if TYPE_CHECKING:
    import torch

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes per entry
SAFETENSORS_DTYPES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written.

    Attributes:
        name: in the checkpoint.
        shape: as in torch.
        dtype: safetensors' name.
        nbytes: size of its data.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file of a model.

    Attributes:
        file: its name.
        entries: its tensors, in the order of the checkpoint.
    """

    file: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(entry.nbytes for entry in self.entries)


def pack(entries: Sequence[Entry], max_shard_bytes: int) -> list[Shard]:
    """Share tensors out over files, in order: one `model.safetensors`, or numbered ones."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.nbytes for e in groups[-1]) + entry.nbytes > max_shard_bytes:
            groups.append([])
        groups[-1].append(entry)
    count = len(groups)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_shard(
    path: Path, shard: Shard, tensors: Iterator[tuple[str, torch.Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a file under a temporary name, flush it to the disk and give it its own.

    Args:
        path: of the file.
        shard: what goes into it.
        tensors: at least those of the shard, in its order; drawn one at a time.
        metadata: of the header.

    Raises:
        OSError: it cannot be written.
    """
    # wide entries first, so that every tensor begins at a multiple of its entries' size
    order = sorted(shard.entries, key=lambda e: -(e.nbytes // max(1, math.prod(e.shape))))
    offsets, end = {}, 0
    for entry in order:
        offsets[entry.name] = end
        end += entry.nbytes
    rows = {
        e.name: {
            "dtype": e.dtype,
            "shape": e.shape,
            "data_offsets": [offsets[e.name], offsets[e.name] + e.nbytes],
        }
        for e in order
    }
    header = json.dumps({"__metadata__": dict(metadata), **rows}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_suffix(".partial")
    with temporary.open("wb", buffering=0) as file:
        _write(file.fileno(), len(header).to_bytes(8, "little") + header, 0)
        for entry, (name, tensor) in zip(shard.entries, tensors, strict=False):
            assert (name, tuple(tensor.shape)) == (entry.name, entry.shape), f"{name} came for {entry.name}"
            assert TORCH_DTYPES[entry.dtype] == str(tensor.dtype).removeprefix("torch."), f"dtype of {name}"
            _write(file.fileno(), _bytes(tensor), 8 + len(header) + offsets[name])
        os.fsync(file.fileno())
    temporary.replace(path)


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`; one system call writes 2 GiB at most."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
