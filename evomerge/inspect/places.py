"""What a user writes for a model on the command line, as a `SourceRef` with a name.

A place is a folder, a hub id (`org/name`, or `org/name@revision`), or a folder or hub id of a LoRA adapter,
told from a full model by its files. `name=place` names it; a bare place is named after its last part.

Imports: `evomerge.errors`, `evomerge.sources`; never torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.sources.adapter import CONFIG
from evomerge.sources.checkpoint import INDEX, SINGLE
from evomerge.sources.reference import SourceRef, looks_like_path, resolve

NAMED = re.compile(r"([\w-]+)=(.+)", re.ASCII | re.DOTALL)


def place(text: str, where: str) -> SourceRef:
    """The source that `text` names.

    Args:
        text: folder or hub id, the latter with `@revision` or without.
        where: begins the message of an error, for example "model `math`".

    Raises:
        SourceError: no such folder, or the hub does not know the id or cannot be reached.
    """
    name, revision = text, None
    if not looks_like_path(text) and "@" in text:
        name, _, revision = text.rpartition("@")
    folder = resolve(SourceRef(model=name, revision=revision), where)
    full = any((folder / file).is_file() for file in (SINGLE, INDEX))
    if (folder / CONFIG).is_file() and not full:
        return SourceRef(adapter=name, revision=revision)
    return SourceRef(model=name, revision=revision)


def named_places(words: Iterable[str]) -> dict[str, SourceRef]:
    """Models by name from words `name=place` or `place`.

    Raises:
        ConfigError: two models have one name, or one has the base's.
        SourceError: as `place`.
    """
    found: dict[str, SourceRef] = {}
    for word in words:
        match = NAMED.fullmatch(word)
        name, text = (match[1], match[2]) if match else (_last_part(word), word)
        if name in found or name == "base":
            taken = f"that of `{found[name].text}` too" if name in found else "the base's"
            raise ConfigError(
                f"model `{text}`: its name `{name}` is {taken}; write NAME={text} with another name"
            )
        found[name] = place(text, f"model `{name}`")
    return found


def patterns(words: Iterable[str]) -> Mapping[str, list[str]]:
    """Extra modules from words `name=pattern`, as `modules` of a run file has them.

    Raises:
        ConfigError: a word has no `=`.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        match = NAMED.fullmatch(word)
        if match is None:
            raise ConfigError(
                f"--module is {word!r}; write NAME=PATTERN, for example `query=q_proj`: tensors in whose "
                "name the regular expression is found form the module NAME"
            )
        found.setdefault(match[1], []).append(match[2])
    return found


def _last_part(text: str) -> str:
    """`Math-7B` for `org/Math-7B@main` and for `./models/Math-7B/`; odd characters become `-`."""
    if looks_like_path(text):
        last = Path(text).expanduser().resolve().name
    else:
        last = text.rpartition("@")[0] or text
        last = last.rpartition("/")[2]
    return re.sub(r"[^\w-]+", "-", last, flags=re.ASCII).strip("-") or "model"
