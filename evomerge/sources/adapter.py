"""A LoRA adapter folder, read as a task vector: delta = scale * B @ A for every tensor that it targets.

Follows Hu et al. 2021 (arXiv:2106.09685) for the product and alpha / r, Kalajdzievski 2023 (arXiv:2312.03732)
for rank-stabilised alpha / sqrt(r), and peft's files for names and patterns. Tensors that were trained in
full (`modules_to_save`, saved embeddings) are replacements of the base's tensors.

Imports: `evomerge.errors`, `evomerge.sources.checkpoint`; torch only when a delta is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import SourceError
from evomerge.sources.checkpoint import TensorFiles, TensorInfo, hash_files, read_header, read_json

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
DEFAULT = 8  # peft's r and lora_alpha, where an old file leaves them out
SUPPORTED = (
    "supported is LoRA on linear and embedding layers, with rank and alpha patterns, rsLoRA and fully "
    "trained modules; merge this adapter into a full checkpoint and give that as `model:`"
)

# Keys of adapter_config.json that change the weights in ways other than scale * B @ A.
REFUSED = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
# Other initialisations (pissa, olora, corda, loftq, lora_ga) subtract from the base model's own weights.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

PART = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one target tensor.

    Attributes:
        a: key of A in the file, shape (r, inputs).
        b: key of B in the file, shape (outputs, r).
        scale: factor of B @ A.
        transpose: the target stores inputs first (embeddings, Conv1D), so the product is transposed.
        shape: shape of the delta.
    """

    a: str
    b: str
    scale: float
    transpose: bool
    shape: tuple[int, int]


class Adapter(TensorFiles):
    """A LoRA adapter folder as peft writes it.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        config: content of `adapter_config.json`.
        pairs: target tensor's name in the base checkpoint -> its LoRA factors.
        full: tensor's name in the base checkpoint -> key of its replacement in the file.

    Raises:
        SourceError: a file is missing or truncated, or the adapter is of an unsupported kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config: Mapping[str, Any] = read_json(self._find(CONFIG))
        self._check_kind()
        super().__init__(read_header(self._find(TENSORS)))
        self.pairs, self.full = self._sort_tensors()

    def delta(self, name: str) -> torch.Tensor | None:
        """scale * B @ A for tensor `name`, float32 on the CPU; None when the adapter has no LoRA there."""
        if name not in self.pairs:
            return None
        pair = self.pairs[name]
        product = self.read(pair.b).float() @ self.read(pair.a).float()
        return (product.T.contiguous() if pair.transpose else product) * pair.scale

    def replacement(self, name: str) -> torch.Tensor | None:
        """The tensor trained in full in place of the base's `name`, as stored; None: there is none."""
        return self.read(self.full[name]) if name in self.full else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape that each touched tensor must have in the base checkpoint."""
        full = {name: self.tensors[key].shape for name, key in self.full.items()}
        return {**full, **{name: pair.shape for name, pair in self.pairs.items()}}

    def sha256(self) -> str:
        """64 hexadecimal digits over the tensor file and `adapter_config.json`, which holds the scales."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return hash_files((self.folder / TENSORS, self.folder / CONFIG))

    def _find(self, name: str) -> Path:
        path = self.folder / name
        if path.is_file():
            return path
        if name == CONFIG and (self.folder / "config.json").is_file():
            raise SourceError(
                f"`{self.folder}` holds a full model and no adapter; give it as `model:`, not `adapter:`"
            )
        if (self.folder / "adapter_model.bin").is_file():
            raise SourceError(
                f"`{self.folder}` holds `adapter_model.bin` but no safetensors, and pickles are not read; "
                "load it with peft and write it again with `save_pretrained`"
            )
        raise SourceError(f"`{path}` does not exist; point to a folder as peft's `save_pretrained` writes it")

    def _check_kind(self) -> None:
        kind = str(self.config.get("peft_type")).upper()
        if kind != "LORA":
            raise SourceError(f"adapter `{self.folder}`: `peft_type` is `{kind}`; {SUPPORTED}")
        bias = self.config.get("bias", "none")
        if bias != "none":
            raise SourceError(f"adapter `{self.folder}`: `bias` is `{bias}`; {SUPPORTED}")
        for key in REFUSED:
            if self.config.get(key):
                raise SourceError(f"adapter `{self.folder}`: `{key}` is set; {SUPPORTED}")
        init = self.config.get("init_lora_weights", True)
        if init not in PLAIN_INITS:
            raise SourceError(
                f"adapter `{self.folder}`: `init_lora_weights` is `{init}`, which changes the base's own "
                "weights; save it with peft's `path_initial_model_for_weight_conversion`, or merge it into a "
                "full checkpoint and give that as `model:`"
            )

    def _sort_tensors(self) -> tuple[dict[str, LoraPair], dict[str, str]]:
        sides: dict[tuple[str, bool], dict[str, str]] = {}
        full: dict[str, str] = {}
        for key in self.tensors:
            name = key.removeprefix("base_model.model.")
            part = PART.match(name)
            if part:
                sides.setdefault((part["module"], bool(part["kind"])), {})[part["side"]] = key
            elif ".lora_" in name:
                raise SourceError(
                    f"adapter `{self.folder}`: tensor `{key}` is of an unknown kind; {SUPPORTED}"
                )
            else:
                full[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = key
        if not sides and not full:
            raise SourceError(f"`{self.folder / TENSORS}` holds no tensors; save the adapter again")
        pairs = {f"{module}.weight": self._pair(module, kind, keys) for (module, kind), keys in sides.items()}
        return pairs, full

    def _pair(self, module: str, embedding: bool, keys: Mapping[str, str]) -> LoraPair:
        if len(keys) != 2:
            raise SourceError(
                f"`{self.folder / TENSORS}` has only one of lora_A and lora_B for `{module}`; "
                "save the adapter again"
            )
        a, b = self.tensors[keys["A"]], self.tensors[keys["B"]]
        rank = _pattern(self.config.get("rank_pattern"), module, self.config.get("r", DEFAULT))
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", DEFAULT))
        if not _factors(a, b, rank):
            raise SourceError(
                f"adapter `{self.folder}`: `{module}` has lora_A of shape {a.shape} and lora_B of shape "
                f"{b.shape}, but r is {rank}: they must be (r, inputs) and (outputs, r); {SUPPORTED}"
            )
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        transpose = embedding or bool(self.config.get("fan_in_fan_out"))
        shape = (a.shape[1], b.shape[0]) if transpose else (b.shape[0], a.shape[1])
        return LoraPair(keys["A"], keys["B"], scale, transpose, shape)


def _factors(a: TensorInfo, b: TensorInfo, rank: int) -> bool:
    return len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern that matches the end of the module's name, as peft's `get_pattern_key` does."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
