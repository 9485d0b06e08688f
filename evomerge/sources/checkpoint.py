"""A checkpoint folder: its tensors by name, known from the safetensors headers, read one at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range)
and the data. Reading headers alone costs milliseconds and tells a truncated file from a whole one.

Tensors are read into memory of their own and never mapped: mapped pages count as resident memory, and a
mapped file must fit into a limited address space, so a merge of large models would not keep a small bound.

Imports: `evomerge.errors`; torch only when a tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import SourceError

if TYPE_CHECKING:
    from io import FileIO

    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATING = ("F64", "F32", "F16", "BF16")
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}
CHUNK = 1 << 22  # bytes per read while hashing


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it.

    Attributes:
        shape: as in torch.
        dtype: safetensors' name, for example "BF16".
        file: the safetensors file that holds it.
        offset: where its data begins in the file, in bytes.
        nbytes: size of its data.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether the tensor can be merged: float64, float32, float16 or bfloat16."""
        return self.dtype in FLOATING


class TensorFiles:
    """Tensors of some safetensors files, by name, in the order of the files and of the data in them.

    Args:
        tensors: headers, as from `read_header`.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, ordered by name."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def bytes(self) -> int:
        """Size of all tensors' data."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of entries of all tensors."""
        return sum(info.numel for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` on the CPU in its stored dtype.

        Raises:
            SourceError: the file has become shorter, or cannot be read.
        """
        info = self.tensors[name]
        return self.read_range(name, 0, info.numel).reshape(info.shape)

    def read_range(self, name: str, low: int, high: int) -> torch.Tensor:
        """Entries [low, high) of the flat tensor `name`, as `read` gives them."""
        import torch

        info = self.tensors[name]
        tensor = torch.empty(high - low, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
        if not tensor.numel():
            return tensor
        width = info.nbytes // info.numel
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.offset + low * width)
                _fill(file, tensor.view(torch.uint8).numpy().data)
        except (OSError, EOFError) as error:
            raise SourceError(
                f"`{info.file}`: tensor `{name}` cannot be read ({error}); restore the file"
            ) from error
        return tensor


class Checkpoint(TensorFiles):
    """A full model's folder.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with their index.

    Attributes:
        config: content of `config.json`.

    Raises:
        SourceError: a file is missing, truncated or not in safetensors; the model is quantized.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config: Mapping[str, Any] = read_json(self._find("config.json"))
        if self.config.get("quantization_config"):
            raise SourceError(
                f"`{self.folder}` is quantized (`quantization_config` in config.json), but only float "
                "tensors can be merged; use the unquantized model"
            )
        super().__init__(self._headers())

    def sha256(self) -> str:
        """64 hexadecimal digits over the tensor files in the order of their names; one file: its own hash."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return hash_files(self.files)

    def _find(self, name: str) -> Path:
        path = self.folder / name
        if path.is_file():
            return path
        if not self.folder.is_dir():
            raise SourceError(f"folder `{self.folder}` does not exist; correct the model's path")
        if (self.folder / "adapter_config.json").is_file():
            raise SourceError(
                f"`{self.folder}` holds a LoRA adapter and no model; give it as `adapter:`, not `model:`"
            )
        raise SourceError(f"`{path}` does not exist; point to a folder as `save_pretrained` writes it")

    def _headers(self) -> dict[str, TensorInfo]:
        if (self.folder / SINGLE).is_file():
            return read_header(self.folder / SINGLE)
        if (self.folder / INDEX).is_file():
            return _read_shards(self.folder / INDEX)
        pickles = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
        if pickles:
            raise SourceError(
                f"`{self.folder}` holds `{pickles[0]}` but no safetensors, and pickles are not read; load "
                "it with transformers and write it again with `save_pretrained`"
            )
        raise SourceError(
            f"`{self.folder}` holds neither `{SINGLE}` nor `{INDEX}`; point to a folder as `save_pretrained` "
            "writes it"
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, in the order of their data.

    Raises:
        SourceError: the file is shorter or longer than its header says, or has no such header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise _truncated(path, size, 8 + length)
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
            tensors = {
                name: TensorInfo(tuple(row["shape"]), row["dtype"], path, 8 + length + start, end - start)
                for name, row in rows
                for start, end in [row["data_offsets"]]
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"`{path}` is not a safetensors file (its header does not parse); download or save it again"
            ) from error
    for name, info in tensors.items():
        if info.dtype not in TORCH_DTYPES:
            raise SourceError(
                f"`{path}`: tensor `{name}` has dtype {info.dtype}, which is not supported; "
                f"supported are: {', '.join(TORCH_DTYPES)}"
            )
    wanted = 8 + length + max((row["data_offsets"][1] for _, row in rows), default=0)
    if size < wanted:
        raise _truncated(path, size, wanted)
    if size > wanted:
        raise SourceError(f"`{path}` has {size} bytes, its header says {wanted}; download or save it again")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file that `read_header` has read."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__") or {})


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        SourceError: it is not JSON, or holds no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"`{path}` cannot be read as JSON ({error}); download or save it again") from error
    if not isinstance(data, dict):
        raise SourceError(f"`{path}` holds no JSON object; download or save it again")
    return data


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()


def _fill(file: FileIO, buffer: memoryview) -> None:
    """Read until `buffer` is full; one system call reads 2 GiB at most."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise EOFError(f"it ends {len(buffer) - done} bytes early")
        done += count


def _truncated(path: Path, size: int, wanted: int) -> SourceError:
    return SourceError(
        f"`{path}` is truncated: it has {size} bytes, its header says at least {wanted}; "
        "download or copy it again"
    )


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"`{index}` has no `weight_map`; download or save the model again")
    found: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.is_file():
            raise SourceError(f"shard `{path}` does not exist, but `{INDEX}` names it; download or copy it")
        header = read_header(path)
        lacking = [name for name, file in weight_map.items() if file == shard and name not in header]
        if lacking:
            raise SourceError(
                f"`{index}` says that `{lacking[0]}` is in `{shard}`, but that file lacks it; download or "
                "save the model again"
            )
        found.update({name: info for name, info in header.items() if weight_map.get(name) == shard})
    return found
