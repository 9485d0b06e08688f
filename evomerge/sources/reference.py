"""Where a source lives: a folder or a hub id, and the local folder that it resolves to.

A text that looks like a path (it begins with ".", "/", "~" or "$", or exists) is never sent to the hub, so
a misspelt folder gives an error and not a download.

Imports: `evomerge.errors`; huggingface_hub only when a hub id is resolved; never torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import SourceError

# Nested folders hold other formats of the same weights (onnx/, original/), `consolidated` is Mistral's own.
HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
HUB_IGNORED = ("*/*", "consolidated*")


@dataclass(frozen=True)
class SourceRef:
    """What the user wrote: exactly one of `model` and `adapter`, and perhaps statistics of it.

    Attributes:
        model: folder or hub id of a full checkpoint.
        adapter: folder or hub id of a LoRA adapter for the base model.
        revision: branch, tag or commit of a hub id; None is the default branch.
        statistics: files as `sources.statistics` reads them.
    """

    model: str | None = None
    adapter: str | None = None
    revision: str | None = None
    statistics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.model is None) == (self.adapter is None):
            got = "neither" if self.model is None else f"both (`{self.model}`, `{self.adapter}`)"
            raise SourceError(
                f"a source has {got} of `model` and `adapter`, but it needs exactly one; "
                "write `model:` for a full checkpoint or `adapter:` for a LoRA adapter"
            )

    @property
    def text(self) -> str:
        """The folder or hub id as the user wrote it."""
        return self.model if self.model is not None else str(self.adapter)

    @property
    def key(self) -> str:
        """`model` or `adapter`: which of the two is set."""
        return "model" if self.model is not None else "adapter"


def expand(text: str) -> str:
    """`text` with `~` and environment variables replaced."""
    return os.path.expanduser(os.path.expandvars(text))


def looks_like_path(text: str) -> bool:
    """Whether `text` names a folder rather than a hub id: its first letter says so, or it exists."""
    return text.startswith((".", "/", "~", "$")) or os.path.isabs(text) or os.path.exists(expand(text))


def resolve(ref: SourceRef, where: str) -> Path:
    """The local folder of `ref`, downloaded from the hub (or found in its cache) when it is a hub id.

    Args:
        ref: the source; the caller has made relative paths absolute.
        where: begins the message of an error, for example "model `math`".

    Raises:
        SourceError: no such folder, a file instead of a folder, a revision of a folder, or the hub does
            not know the id or cannot be reached.
    """
    if not looks_like_path(ref.text):
        return _download(ref, where)
    folder = Path(expand(ref.text))
    if not folder.exists():
        raise SourceError(f"{where}: folder `{folder}` does not exist; correct `{ref.key}`")
    if not folder.is_dir():
        raise SourceError(f"{where}: `{folder}` is a file; give `{ref.key}` the folder that holds it")
    if ref.revision is not None:
        raise SourceError(
            f"{where}: `revision` is `{ref.revision}`, but `{folder}` is a folder and has none; "
            "remove `revision` or give a hub id"
        )
    return folder


def commit_of(folder: Path) -> str | None:
    """Commit of a folder in the hub's cache (`.../snapshots/COMMIT`); None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _download(ref: SourceRef, where: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    revision = f" at revision `{ref.revision}`" if ref.revision else ""
    try:
        return Path(
            snapshot_download(
                ref.text,
                revision=ref.revision,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=list(HUB_IGNORED),
            )
        )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{where}: hub id `{ref.text}` is gated; "
            "accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise SourceError(
            f"{where}: `{ref.text}`{revision} is neither a folder here nor known to the hub; "
            f"correct `{ref.key}` or `revision`, or log in with `hf auth login` if it is private"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{where}: folder `{ref.text}` does not exist, and as a hub id{revision} it is not in the cache "
            f"and the hub cannot be reached ({type(error).__name__}); correct `{ref.key}` or go online"
        ) from error
