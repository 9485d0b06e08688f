"""One pass over base and models, tensor after tensor, that fills the sums of every cell.

Each stored tensor is read once. At any time one tensor of the base and its task vectors (float32, one per
model) are held, with the magnitudes of one of them while they are sorted, and a block of float64.

Imports: `evomerge.inspect.sums`, `evomerge.sources`, numpy, torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from evomerge.inspect.sums import ModelSums, PairSums
from evomerge.recipe import Cell
from evomerge.sources.adapter import Adapter
from evomerge.sources.layout import Layout
from evomerge.sources.source_set import SourceSet
from evomerge.sources.tying import head_of, is_tied, mergeable

BLOCK = 1 << 17  # entries of each task vector that are in float64 at one time
NOT_FINITE = "holds NaN or infinite entries"

Pair = tuple[str, str]
Progress = Callable[[int, int], None]  # tensors done, tensors in all


class Measured(NamedTuple):
    """Sums per model and per pair, in the order of the models; `skipped` is model -> tensor -> reason."""

    models: dict[str, dict[Cell, ModelSums]]
    pairs: dict[Pair, dict[Cell, PairSums]]
    skipped: dict[str, dict[str, str]]


def measure(sources: SourceSet, layout: Layout, progress: Progress | None = None) -> Measured:
    """Sums of every cell of `layout`, over the floating-point tensors that a merge writes.

    A tensor that a model lacks, or has in another shape, takes no part for this model. One that a model
    leaves as it is counts as a task vector of zeros.
    """
    names = [name for name in sources.tensor_names if sources.base.tensors[name].floating]
    skipped = {model: not_comparable(sources, model) for model in sources.models}
    pairs = list(combinations(sources.models, 2))
    measured = Measured({model: {} for model in sources.models}, {pair: {} for pair in pairs}, skipped)
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names))
        present = [model for model in sources.models if name not in skipped[model]]
        if present:
            _measure_tensor(sources, name, present, layout.cell(name), measured)
    if progress is not None:
        progress(len(names), len(names))
    return measured


def not_comparable(sources: SourceSet, model: str) -> dict[str, str]:
    """Tensors of base or model that cannot be compared, with the reason; known from headers."""
    base, source = sources.base, sources.sources[model]
    if isinstance(source, Adapter):
        shapes = source.shapes()
        own = {name for name in shapes if not (is_tied(base) and name == head_of(shapes))}
        missing: set[str] = set()
    else:
        shapes = {name: info.shape for name, info in source.tensors.items()}
        own = set(mergeable(source))
        missing = set(sources.tensor_names) - set(shapes)
    found = {name: "is missing" for name in sources.tensor_names if name in missing}
    for name in sources.tensor_names:
        if name not in shapes:
            continue
        if shapes[name] != base.tensors[name].shape:
            found[name] = f"has shape {shapes[name]}, base has {base.tensors[name].shape}"
        elif not isinstance(source, Adapter) and base.tensors[name].floating > source.tensors[name].floating:
            found[name] = f"is stored as {source.tensors[name].dtype}, which cannot be merged"
    foreign = own - set(base.tensors)
    found.update({name: "is not in the base" for name in shapes if name in foreign})
    return found


def _measure_tensor(
    sources: SourceSet, name: str, present: list[str], cell: Cell, measured: Measured
) -> None:
    """Add one tensor to `measured`."""
    base = sources.base_tensor(name)
    sound = _finite(base)
    deltas = {}
    for model in present:
        delta = sources.delta(model, name, base)
        if sound and (delta is None or _finite(delta)):
            deltas[model] = delta
        else:
            measured.skipped[model][name] = NOT_FINITE
    if not deltas:
        return
    models, pairs = tensor_sums(base, deltas)
    for model, sums in models.items():
        cells = measured.models[model]
        cells[cell] = cells[cell] + sums if cell in cells else sums
    for pair, both in pairs.items():
        shared = measured.pairs[pair]
        shared[cell] = shared[cell] + both if cell in shared else both


def tensor_sums(
    base: torch.Tensor, deltas: Mapping[str, torch.Tensor | None]
) -> tuple[dict[str, ModelSums], dict[Pair, PairSums]]:
    """Sums of one tensor.

    Args:
        base: any shape, floating point, finite.
        deltas: model -> task vector, float32, shaped like `base`, finite; None is a task vector of zeros.

    Returns:
        Sums by model and by pair of models, pairs in the order of `deltas`.
    """
    entries, base_squares = base.numel(), _squares(base.flatten())
    vectors = {model: delta.flatten() for model, delta in deltas.items() if delta is not None}
    place = {model: at for at, model in enumerate(vectors)}
    products = _Products(list(vectors.values()))
    models = {
        model: ModelSums(
            entries,
            base_squares,
            products.gram[place[model], place[model]].item(),
            int(products.both[place[model], place[model]]),
            equal_magnitudes(vectors[model]),
        )
        if model in place
        else ModelSums(entries, base_squares)
        for model in deltas
    }
    pairs = {(a, b): products.pair(entries, place.get(a), place.get(b)) for a, b in combinations(deltas, 2)}
    return models, pairs


class _Products:
    """Inner products of k flat vectors `(n,)` and of their signs, in float64: k x k each, exact counts."""

    def __init__(self, vectors: list[torch.Tensor]) -> None:
        k = len(vectors)
        self.total = torch.zeros(k, dtype=torch.float64)
        self.gram, self.both, self.agreement, self.distance = torch.zeros(4, k, k, dtype=torch.float64)
        for begin in range(0, vectors[0].numel() if vectors else 0, BLOCK):
            block = torch.stack([vector[begin : begin + BLOCK] for vector in vectors]).double()
            self.total += block.sum(1)
            self.gram += block @ block.T
            signs = block.sign()
            self.agreement += signs @ signs.T  # agreeing less conflicting signs
            signs.abs_()
            self.both += signs @ signs.T
            for a, b in combinations(range(k), 2):  # not from the Gram matrix: near vectors would cancel
                difference = block[a] - block[b]
                self.distance[a, b] += difference @ difference

    def pair(self, entries: int, a: int | None, b: int | None) -> PairSums:
        """Sums of vectors `a` and `b`; None is a vector of zeros."""
        total_a, squares_a = self._one(a)
        total_b, squares_b = self._one(b)
        if a is None or b is None:
            return PairSums(
                entries, total_a, total_b, squares_a, squares_b, distance_squares=squares_a + squares_b
            )
        both = int(self.both[a, b])
        return PairSums(
            entries,
            total_a,
            total_b,
            squares_a,
            squares_b,
            dot=self.gram[a, b].item(),
            distance_squares=self.distance[a, b].item(),
            both=both,
            conflicts=(both - int(self.agreement[a, b])) // 2,
        )

    def _one(self, at: int | None) -> tuple[float, float]:
        return (0.0, 0.0) if at is None else (self.total[at].item(), self.gram[at, at].item())


def equal_magnitudes(delta: torch.Tensor) -> int:
    """Number of non-zero entries whose magnitude at least one other entry has, exactly, by sorting.

    Args:
        delta: flat, `(n,)`, float32, finite.
    """
    magnitudes = delta.abs().numpy()
    magnitudes.sort()
    magnitudes = magnitudes[np.searchsorted(magnitudes, np.float32(0), side="right") :]
    same = magnitudes[1:] == magnitudes[:-1]  # each run of r equal ones gives r - 1
    begins = int(same[:1].sum()) + int(np.count_nonzero(same[1:] & ~same[:-1]))
    return int(np.count_nonzero(same)) + begins


def _squares(flat: torch.Tensor) -> float:
    total = 0.0
    for begin in range(0, flat.numel(), BLOCK):
        block = flat[begin : begin + BLOCK].double()
        total += (block @ block).item()
    return total


def _finite(tensor: torch.Tensor) -> bool:
    flat = tensor.flatten()
    return all(bool(flat[begin : begin + BLOCK].isfinite().all()) for begin in range(0, flat.numel(), BLOCK))
