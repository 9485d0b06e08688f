"""Statistics of a model beside its weights, as some merge methods need them: safetensors files.

A tensor is named KIND/NAME, NAME a tensor of the model as its checkpoint has it:

    fisher/NAME          diagonal of the Fisher information, shaped like NAME
    second_moment/NAME   Adam's `exp_avg_sq` at the end of training, shaped like NAME
    gram/NAME            X^T X / rows, `(k, k)`, of the inputs X `(rows, k)` of the linear layer with weight
                         NAME `(outputs, k)`

`evomerge statistics` writes the first and the last. A tensor without statistics is averaged by the methods.
In the metadata, `model_sha256` (and for an adapter `base_sha256`) says of which model they are, and `shared`
is a JSON object NAME -> NAME: layers with one input have one Gram matrix.

Imports: `evomerge.errors`, `evomerge.sources.checkpoint`; torch only when tensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import CompatibilityError, SourceError
from evomerge.sources.checkpoint import TensorFiles, TensorInfo, hash_files, read_header, read_metadata

if TYPE_CHECKING:
    import torch

FISHER, GRAM, SECOND_MOMENT = "fisher", "gram", "second_moment"
KINDS = (FISHER, GRAM, SECOND_MOMENT)
BLOCK = 1 << 20  # entries looked at once


def lacking(method: str, kind: str, model: str) -> str:
    """The message for a model without the statistics that a method needs."""
    made = {
        SECOND_MOMENT: "save Adam's `exp_avg_sq` of its training as a safetensors file of tensors "
        "`second_moment/NAME`"
    }
    how = made.get(kind, f"make them with `evomerge statistics --kind {kind}`")
    return (
        f"{method} needs the `{kind}` statistics of every model, but model `{model}` has none; {how}, and "
        "name the file in the model's `statistics`"
    )


class ModelStatistics:
    """The statistics of one model, from one file or several.

    Args:
        paths: safetensors files.
        where: begins the message of an error, for example "model `math`".

    Attributes:
        files: the files, in the order given.
        kinds: what they hold, in the order of `KINDS`.

    Raises:
        SourceError: a file is missing or truncated, a tensor's name has no kind, or a tensor is there twice.
    """

    def __init__(self, paths: Sequence[str], where: str) -> None:
        self.files = tuple(Path(path) for path in paths)
        self._where = where
        self._metadata: dict[Path, dict[str, str]] = {}
        self._shared: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            header, self._metadata[file] = self._read(file)
            twice = sorted(tensors.keys() & header.keys())
            if twice:
                raise SourceError(f"{where}: statistics `{twice[0]}` are in two files; name one of them")
            tensors.update(header)
            self._shared.update(self._sharing(file))
        self._tensors = TensorFiles(tensors)
        found = {key.partition("/")[0] for key in tensors}
        self.kinds = tuple(kind for kind in KINDS if kind in found)
        self._rms: dict[str, float] = {}

    def read(self, kind: str, name: str) -> torch.Tensor | None:
        """Statistics of tensor `name` on the CPU as stored; None where there are none."""
        if kind == GRAM:
            name = self._shared.get(name, name)
        key = f"{kind}/{name}"
        return self._tensors.read(key) if key in self._tensors.tensors else None

    def rms(self, kind: str) -> float:
        """Root mean square of all entries of a kind; one pass over the file, remembered."""
        if kind not in self._rms:
            total, count = 0.0, 0
            for key, info in self._tensors.tensors.items():
                if key.startswith(f"{kind}/"):
                    count += info.numel
                    for low in range(0, info.numel, BLOCK):
                        block = self._tensors.read_range(key, low, min(low + BLOCK, info.numel))
                        total += float(block.double().square().sum())
            self._rms[kind] = (total / count) ** 0.5 if count else 0.0
        return self._rms[kind]

    def sha256(self) -> str:
        """64 hexadecimal digits over the files in their order."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return hash_files(self.files)

    def check_shapes(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Compare with the tensors of the base.

        Raises:
            CompatibilityError: a name that the base has not got, or another shape.
        """
        for key, info in self._tensors.tensors.items():
            kind, _, name = key.partition("/")
            for user in [name, *(user for user, owner in self._shared.items() if owner == name)]:
                if user not in tensors:
                    raise self._unfit(f"`{key}` is for a tensor `{user}`, which the base has not got")
                shape = tensors[user].shape
                wanted = (shape[-1], shape[-1]) if kind == GRAM and len(shape) == 2 else shape
                if info.shape != wanted or not info.floating:
                    raise self._unfit(
                        f"`{key}` has shape {info.shape} and dtype {info.dtype}, but for a tensor `{user}` "
                        f"of shape {shape} it must be floating point of shape {wanted}"
                    )

    def check_hash(self, key: str, sha256: Callable[[], str]) -> None:
        """Compare a hash that the metadata state, if they do; `sha256` is that of what is there.

        Raises:
            CompatibilityError: the two differ.
        """
        for file, metadata in self._metadata.items():
            if key in metadata and metadata[key] != sha256():
                what = "model" if key == "model_sha256" else "base model"
                raise self._unfit(
                    f"`{file}` was made from a {what} with SHA-256 {metadata[key][:12]}, but the {what} here "
                    f"has {sha256()[:12]}"
                )

    def _unfit(self, problem: str) -> CompatibilityError:
        return CompatibilityError(
            f"{self._where}: statistics: {problem}; make them again with `evomerge statistics`, or correct "
            "`statistics`"
        )

    def _read(self, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if not file.is_file():
            raise SourceError(
                f"{self._where}: statistics: file `{file}` does not exist; correct `statistics`"
            )
        try:
            header = read_header(file)
        except SourceError as error:
            raise SourceError(f"{self._where}: statistics: {error}") from error
        for key in header:
            if key.partition("/")[0] not in KINDS:
                raise SourceError(
                    f"{self._where}: statistics `{file}`: tensor `{key}` names no kind; name tensors "
                    f"KIND/NAME with one of the kinds {', '.join(KINDS)}, for example `{SECOND_MOMENT}/{key}`"
                )
        if not header:
            raise SourceError(f"{self._where}: statistics `{file}` has no tensors; make it again")
        return header, read_metadata(file)

    def _sharing(self, file: Path) -> dict[str, str]:
        try:
            return {str(k): str(v) for k, v in json.loads(self._metadata[file].get("shared", "{}")).items()}
        except (ValueError, AttributeError) as error:
            raise SourceError(
                f"{self._where}: statistics `{file}`: metadata `shared` is no JSON object; make it again"
            ) from error
