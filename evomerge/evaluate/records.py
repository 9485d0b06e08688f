"""Item scores at rest: one gzip-compressed JSONL file per evaluation.

A file is complete or absent: it is written under another name, then renamed. Equal scores give equal
bytes, whenever they are written.

Imports: `evomerge.errors`, `evaluate.score`; never torch.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import secrets
import zlib
from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import StorageError
from evomerge.evaluate.score import ItemScore

_KEY = re.compile(r"(?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)*", re.ASCII)


class ItemStore:
    """Item scores by key, such as `calibration/000012-ab12cd34`, as files under `folder`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of `key`, written or not; `StorageError` when `key` would leave the folder."""
        if not _KEY.fullmatch(key):
            raise StorageError(
                f"{self.folder}: key {key!r} must be names of letters, digits, `-`, `_` and `.` "
                "that begin with no dot, joined by `/`"
            )
        return self.folder / f"{key}.jsonl.gz"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def write(self, key: str, scores: Sequence[ItemScore]) -> Path:
        """Write `scores` under `key`, over what was there; returns the file.

        Raises:
            StorageError: the file cannot be written.
        """
        path = self.path(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
            for score in scores:
                file.write((json.dumps(vars(score), ensure_ascii=False, allow_nan=False) + "\n").encode())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as raw:
                raw.write(buffer.getvalue())
                raw.flush()
                os.fsync(raw.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); free space or check rights"
            ) from error
        return path

    def read(self, key: str) -> list[ItemScore]:
        """The scores under `key`, in the order in which they were written.

        Raises:
            StorageError: there is no such file, or it is damaged.
        """
        path = self.path(key)
        try:
            text = gzip.decompress(path.read_bytes()).decode()
            return [ItemScore(**json.loads(line)) for line in text.split("\n")[:-1]]
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file; evaluate again or restore it") from error
        except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
            raise StorageError(
                f"{path}: damaged ({type(error).__name__}: {error}); delete it and evaluate again"
            ) from error
