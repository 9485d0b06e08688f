"""The command lines that the parity tests give mergekit."""

from __future__ import annotations

from pathlib import Path


def command(folder: Path, documents: int, cache: Path, seed: int) -> str:
    """The command line for `file.yaml` with this many documents, in `folder`; the result is in `OUT`.

    mergekit remembers models by their paths, so those of the stages must not be relative.
    """
    start = "mergekit-yaml file.yaml OUT"
    if documents > 1:
        start = f"mergekit-multi file.yaml -I {folder}/STAGES --out-path OUT"
    return f"{start} --random-seed {seed} --lora-merge-cache {cache} --lora-merge-dtype float32"
