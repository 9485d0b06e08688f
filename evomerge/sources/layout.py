"""Tensor name -> (layer, module): which cell of a recipe a tensor belongs to.

The layer is the first number after `layers.`, `h.`, `blocks.`, `block.` or `layer.`. The module is the
first entry of `MODULES` whose pattern is found in the name; a user's own patterns are tried before the
built-in ones. Tensors of other towers (vision, audio, projectors) have no layer: a depth group speaks
of the language model.

Imports: `evomerge.recipe` only; never torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from evomerge.errors import ConfigError
from evomerge.recipe import Cell

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")

# Order matters: norms sit inside attention blocks ("post_attention_layernorm", "self_attn.q_norm"), and
# routers and experts sit inside the mlp.
MODULES: dict[str, tuple[str, ...]] = {
    "tower": (r"(?:^|\.)(?:vision|visual|audio|image|speech|multi_modal|mm_|connector|projector|merger)",),
    "norm": (r"norm", r"(?:^|\.)ln_?\w*\."),
    "router": (r"\.gate\.(?:weight|bias|e_score)", r"router", r"shared_expert_gate"),
    "experts": (r"experts?\.", r"experts?_"),
    "attention": (r"attn", r"attention", r"\.mixer\."),
    "mlp": (r"mlp", r"feed_forward", r"ffn", r"\.fc\d"),
    "embedding": (r"embed", r"\.?w[tp]e\.", r"lm_head"),
    "rest": (r"",),
}


class Layout:
    """The cells of a model.

    Args:
        tensors: every tensor name of the base checkpoint.
        modules: extra patterns (module name -> regular expressions, searched in the tensor name), tried
            before the built-in ones; a new name makes a new module.

    Raises:
        ConfigError: a pattern is not a regular expression.
    """

    def __init__(self, tensors: Iterable[str], modules: Mapping[str, Iterable[str]] | None = None) -> None:
        self.tensors = tuple(tensors)
        self.extra_modules = {name: tuple(patterns) for name, patterns in (modules or {}).items()}
        self._patterns = [
            (name, _compile(name, pattern))
            for table in (self.extra_modules, MODULES)
            for name, patterns in table.items()
            for pattern in patterns
        ]

    def cell(self, tensor: str) -> Cell:
        """The cell that `tensor` belongs to."""
        module = next(name for name, pattern in self._patterns if pattern.search(tensor))
        number = None if module == "tower" else LAYER.search(tensor)
        return Cell(int(number.group(1)) if number else None, module)

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module name that a pattern exists for, whether or not the model has such tensors."""
        return tuple(dict.fromkeys([*self.extra_modules, *MODULES]))

    @cached_property
    def by_cell(self) -> dict[Cell, tuple[str, ...]]:
        """Tensor names by cell, in the order of the checkpoint."""
        result: dict[Cell, list[str]] = {}
        for tensor in self.tensors:
            result.setdefault(self.cell(tensor), []).append(tensor)
        return {cell: tuple(names) for cell, names in result.items()}

    @cached_property
    def n_layers(self) -> int:
        """Number of layers: one more than the largest layer number (0 when nothing is numbered)."""
        return 1 + max((cell.layer for cell in self.by_cell if cell.layer is not None), default=-1)


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"module `{name}`: pattern {pattern!r} is not a regular expression ({error})"
        ) from error
