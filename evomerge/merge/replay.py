"""The random masks that mergekit 0.1.5 itself draws for dare_* and della*, drawn again.

    mergekit-yaml FILE OUT --random-seed SEED   and   evomerge merge FILE OUT --mergekit-rng SEED

give the same bits, found by running mergekit: a generator seeded anew for every document makes one draw per
entry, tensor after tensor in string order of the names ("layers.10." before "layers.2."), model after model
in the document's order; a model whose density is 1 for that tensor draws nothing. Rescaling divides L1 norms
that are summed in float32.

Limits. The same bits need `dtype: float32`, mergekit on one CPU process (not `--cuda`, not `--multi-gpu`),
the same torch and number of threads, at most 4 models and no tokenizer key. Adapters are refused: mergekit
merges them with the same generator, unless they lie in its cache. A base tensor that mergekit does not know,
because it is not in its description of the architecture, shifts every draw after it. Masks of a search are
never these: they would depend on the order of the merge (see `evomerge.merge.mask`).

Imports: torch, `evomerge.merge`, `evomerge.sources`, `evomerge.errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from evomerge.errors import RecipeError
from evomerge.merge.methods import METHODS
from evomerge.merge.methods._gta import SMALLEST_NORM, gta
from evomerge.merge.methods._method import Kernel, TensorInputs
from evomerge.merge.methods.della import row_length
from evomerge.merge.plan import TensorOp
from evomerge.sources.source_set import SourceSet
from evomerge.sources.streamed import TaskVector

METHODS_REPLAYED = {"dare_linear": False, "dare_ties": True, "della_linear": False, "della": True}  # elects?
BLOCK = 1 << 20  # entries drawn in one step while the generator is led to its next place


@dataclass(frozen=True)
class _Thinned:
    """A task vector after masking and rescaling, flat."""

    entries: torch.Tensor

    def write(self, delta: TaskVector, low: int, high: int, out: torch.Tensor) -> None:
        out.copy_(self.entries[low:high])


class Replay:
    """One document's draws.

    Args:
        seed: of mergekit's `--random-seed`, in [0, 2**32).
        ops: of all tensors of the document, of one of `METHODS_REPLAYED`.
        sources: what they merge.

    Raises:
        RecipeError: mergekit cannot rank the rows of a tensor, because they have one entry.
    """

    def __init__(self, seed: int, ops: Sequence[TensorOp], sources: SourceSet) -> None:
        self._sources = sources
        # (tensor, model) -> the generator before its draws
        self._states: dict[tuple[str, str], torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        chance = torch.full((BLOCK,), 0.5)
        for op in sorted(ops, key=lambda op: op.tensor):
            info = sources.base.tensors[op.tensor]
            for model, values in op.setting.models.items():
                if values["density"] >= 1.0:
                    continue  # else mergekit draws, for buffers of whole numbers too
                if "epsilon" in values and row_length(info.shape) == 1:
                    raise RecipeError(
                        f"{op.cell}, tensor `{op.tensor}`: mergekit cannot rank rows of one entry; give it "
                        "density 1, or leave `--mergekit-rng` out"
                    )
                self._states[op.tensor, model] = generator.get_state()
                for low in range(0, info.numel, BLOCK):
                    torch.bernoulli(chance[: info.numel - low], generator=generator)

    def merge(self, op: TensorOp) -> torch.Tensor:
        """The merged tensor, float32; one that is not floating is the base's."""
        base, setting = self._sources.base_tensor(op.tensor), op.setting
        if not base.is_floating_point():
            return base
        deltas = [self._sources.delta(model, op.tensor) for model in setting.models]
        inputs = TensorInputs(
            base=base.float().reshape(-1),
            deltas=[None if delta is None else delta.reshape(-1) for delta in deltas],
            setting=setting,
            dtype=torch.float32,
            shape=tuple(base.shape),
            where=f"{op.cell}, tensor `{op.tensor}`",
            name=op.tensor,
        )
        return replace(METHODS[setting.method], kernel=self._kernel).merge(inputs)

    def _kernel(self, inputs: TensorInputs) -> Kernel:
        setting = inputs.setting
        # entries are rescaled here, by norms summed as mergekit does
        plain = replace(setting, parameters={**setting.parameters, "rescale": False})
        consensus, rescale = METHODS_REPLAYED[setting.method], inputs.parameter("rescale")

        def thin(inputs: TensorInputs, index: int, delta: TaskVector, density: float) -> _Thinned:
            whole = delta[:]
            kept = whole * self._draw(inputs, index, whole, density)
            before, after = whole.abs().sum(), kept.abs().sum()
            if rescale and before >= SMALLEST_NORM and after >= SMALLEST_NORM:
                kept *= before / after

            return _Thinned(kept)

        return gta(replace(inputs, setting=plain), sparsify=thin, consensus=consensus)

    def _draw(self, inputs: TensorInputs, index: int, delta: torch.Tensor, density: float) -> torch.Tensor:
        """The flat mask of one model: 1 where an entry is kept."""
        generator = torch.Generator()
        generator.set_state(self._states[inputs.name, inputs.models[index]])
        if "epsilon" not in inputs.setting.models[inputs.models[index]]:
            return torch.bernoulli(torch.full_like(delta, density), generator=generator)
        epsilon, m = inputs.values("epsilon")[index], row_length(inputs.shape)
        # not stable, as mergekit's: it decides the ranks of equal magnitudes
        order = delta.view(inputs.shape if len(inputs.shape) > 1 else (1, m)).abs().argsort(dim=1)
        places = torch.arange(m, dtype=delta.dtype).view(1, m, *[1] * (order.dim() - 2))
        ranks = torch.empty(order.shape).scatter_(1, order, places.expand_as(order))
        chances = density - epsilon + 2.0 * epsilon * ranks / (m - 1)
        return torch.bernoulli(chances, generator=generator).reshape(-1)
