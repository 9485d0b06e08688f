"""The models that parity recipes merge: eight families of tiny models, made when first asked for.

Every family has `base`, two near experts (`near`; `parts`, stored in three shards), a distant one (`far`,
stored as float32 whatever the base's dtype) and an adapter (`lora`).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from evomerge.sources.reference import SourceRef
from evomerge.sources.source_set import SourceSet
from tests.tiny import tiny_adapter, tiny_model


class Family(NamedTuple):
    architecture: str
    dtype: torch.dtype
    layers: int
    tied: bool = True


FAMILIES = {
    "llama-bf16": Family("llama", torch.bfloat16, 4),
    "llama-f32": Family("llama", torch.float32, 2, tied=False),
    "qwen2-f16": Family("qwen2", torch.float16, 3),
    "qwen2-f32": Family("qwen2", torch.float32, 3, tied=False),
    "gemma-bf16": Family("gemma", torch.bfloat16, 2),
    "gemma-f32": Family("gemma", torch.float32, 3),
    "neox-f16": Family("gpt_neox", torch.float16, 2, tied=False),
    "neox-f32": Family("gpt_neox", torch.float32, 3, tied=False),
}
EXPERTS = ("near", "parts", "far")
TARGETS = ("q_proj", "v_proj", "down_proj", "query_key_value", "dense_4h_to_h")


class Home:
    """Makes families below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sources = cache(self._make)

    def _make(self, name: str) -> SourceSet:
        home, family = self._folder / name, FAMILIES[name]
        base = tiny_model(
            home / "base",
            architecture=family.architecture,
            dtype=family.dtype,
            layers=family.layers,
            tied=family.tied,
            hidden=32,
        )
        near = tiny_model(home / "near", 1, noise_from=base)
        parts = store(tiny_model(home / "parts", 2, noise_from=base), shards=3)
        far = store(tiny_model(home / "far", 3, noise_from=base, noise=0.1), dtype=torch.float32)
        lora = tiny_adapter(home / "lora", base, 4, targets=TARGETS)
        models = {"near": near, "parts": parts, "far": far}
        refs = {model: SourceRef(model=str(folder)) for model, folder in models.items()}
        return SourceSet.open(SourceRef(model=str(base)), {**refs, "lora": SourceRef(adapter=str(lora))})

    def place(self, family: str, reference: str) -> str:
        """mergekit's reference of `near`, or of `near+lora`; names of documents are left as they are."""
        folders = self.sources(family).folders
        return "+".join(str(folders.get(part, part)) for part in reference.split("+"))


def store(folder: Path, *, shards: int = 1, dtype: torch.dtype | None = None) -> Path:
    """Store a tiny model again, in several files or in another dtype."""
    whole = folder / "model.safetensors"
    tensors = {name: _cast(tensor, dtype) for name, tensor in load_file(whole).items()}
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, whole, {"format": "pt"})
        return folder
    whole.unlink()
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
