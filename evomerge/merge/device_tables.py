"""What the kernels of `evomerge.merge._triton` are told: a formula for a launch, rows of numbers per tensor.

The numbers are those that `evomerge.merge.methods` settle, in the same order and rounding. What depends on
whole tensors and is not remembered (the places of cuts, norms) stays on the device.

Has not run on a GPU yet: checked in Triton's interpreter.

Imports: torch, `evomerge.merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from evomerge.merge.device_sources import Cache
from evomerge.merge.magnitude import Choice, MagnitudeIndex
from evomerge.merge.mask import keys_of, threshold, thresholds
from evomerge.merge.methods._gta import SMALLEST_NORM, divisor_of
from evomerge.merge.methods.breadcrumbs import counts_of
from evomerge.merge.methods.della import keep_probabilities, row_length, row_ranks
from evomerge.merge.methods.linear import SMALLEST_SUM
from evomerge.merge.methods.ties import kept_of
from evomerge.merge.plan import TensorOp
from evomerge.sources.streamed import RawDelta, TaskVector

# Columns of the tables, of a tensor and of each of its terms.
# base, result, n; source, ranks, limits by rank, 2 keys, limit; and of the outer and the inner cut its place
# (before it is found: how many of the equal entries stand before it), and the bits of the limits around it
WORDS, TERM_WORDS = 3, 12
NUMBERS, TERM_NUMBERS = 3, 2  # divisor, scale, least weight; factor, weight
CUTS = (6, 9)  # where these begin

# what is kept of a term: everything, between two cuts, by hash, by hash and rank (int16 or int32)
WHOLE, CUT, HASHED, RANKED, RANKED_WIDE = range(5)

# what is done with the terms
SUM, ELECT, ELECT_NORMALIZED, AVERAGE = range(4)

# method -> what is kept of a task vector, whether signs are elected
FAMILY = {
    "linear": (WHOLE, False),
    "task_arithmetic": (WHOLE, False),
    "ties": (CUT, True),
    "breadcrumbs": (CUT, False),
    "breadcrumbs_ties": (CUT, True),
    "dare_linear": (HASHED, False),
    "dare_ties": (HASHED, True),
    "della_linear": (RANKED, False),
    "della": (RANKED, True),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_TERMS = 16  # more are left to torch: the kernel would take long to compile and run out of registers
NEGATIVE, INFINITE = -0x40800000, 0x7F800000  # bits of limits in float32: -1 and infinity
UNCUT = [0, NEGATIVE, NEGATIVE, 0, INFINITE, INFINITE]  # keeps everything
NOTHING = [0, INFINITE, INFINITE, 0, INFINITE, INFINITE]  # keeps no entry


class Formula(NamedTuple):
    """What a launch is compiled for.

    Attributes:
        mode: what is done with the terms.
        kinds: what is kept of each.
        raws: whether its source is a whole tensor in the base's dtype, and not a float32 task vector.
        dtype: of the base.
        rescaled: whether factors depend on norms.
    """

    mode: int
    kinds: tuple[int, ...]
    raws: tuple[bool, ...]
    dtype: torch.dtype
    rescaled: bool

    @property
    def block(self) -> int:
        """Entries that one program merges: the terms of a block stay in registers."""
        return 2048 if len(self.kinds) <= 4 else 1024


class Term(NamedTuple):
    """One model's part in a merge.

    Attributes:
        model: its place in the setting.
        delta: its task vector.
        weight: before rescaling.
    """

    model: int
    delta: TaskVector
    weight: float

    @property
    def held(self) -> torch.Tensor:
        """What the kernel reads."""
        return self.delta.source if isinstance(self.delta, RawDelta) else self.delta[:]


class Job(NamedTuple):
    """One tensor to merge.

    Attributes:
        op: the operation.
        formula: what the kernel is compiled for.
        base: the base's tensor, contiguous.
        merged: like it, for the result.
        terms: one or more, in the setting's order.
        divisor: of the sum.
    """

    op: TensorOp
    formula: Formula
    base: torch.Tensor
    merged: torch.Tensor
    terms: list[Term]
    divisor: float

    @classmethod
    def of(cls, op: TensorOp, base: torch.Tensor, deltas: Sequence[TaskVector | None]) -> Job | None:
        """The job of an operation, `deltas` by its models; None where torch has to merge the tensor."""
        values, shared = list(op.setting.models.values()), op.setting.parameters
        weights = [one["weight"] for one in values]
        kind, consensus = FAMILY[op.setting.method]
        normalized = bool(shared["normalize"])
        if all(delta is None for delta in deltas) or len(deltas) > MOST_TERMS:
            return None
        if op.setting.method == "linear":
            same = RawDelta(base.reshape(-1), base.reshape(-1))
            terms = [Term(k, same if delta is None else delta, weights[k]) for k, delta in enumerate(deltas)]
            divisor = float(torch.tensor(weights).sum()) if normalized else 1.0
            mode = AVERAGE
            if abs(divisor) < SMALLEST_SUM:
                return None
        else:
            terms = [
                Term(k, delta, weights[k])
                for k, delta in enumerate(deltas)
                if delta is not None and weights[k]
            ]
            if not terms:
                return None
            divisor = divisor_of([term.weight for term in terms], weights, normalized, consensus)
            elected = ELECT_NORMALIZED if normalized else ELECT
            mode = elected if consensus and len(terms) > 1 else SUM
        kinds = tuple(_kind(kind, values[term.model], tuple(base.shape)) for term in terms)
        raws = tuple(isinstance(term.delta, RawDelta) for term in terms)
        how = Formula(mode, kinds, raws, base.dtype, any(kinds) and bool(shared.get("rescale")))
        return cls(op, how, base, torch.empty_like(base), terms, divisor)


def _kind(kind: int, values: Mapping[str, float], shape: tuple[int, ...]) -> int:
    if values.get("density", 1.0) >= 1.0:
        kind = WHOLE
    elif kind == RANKED and values["epsilon"] == 0.0:
        kind = HASHED
    elif kind == RANKED and row_length(shape) > 1 << 15:  # as `row_ranks` chooses
        kind = RANKED_WIDE
    return kind


class Tables:
    """The rows of one launch.

    Args:
        jobs: of one formula.
        device: where the tables go.
        cache: what depends on sources only.

    Attributes:
        words, numbers: see `_triton`.
        weights: `(jobs, terms)` float64 and the smallest norm, `(1,)`, where factors are rescaled.
        kept: tensors that the kernels read and nobody else holds.
        tied: whether the place of a cut is to be found.
    """

    def __init__(self, jobs: list[Job], device: torch.device, cache: Cache) -> None:
        self.jobs, self.formula = jobs, jobs[0].formula
        self.kept: list[torch.Tensor] = []
        self.tied = False
        self._device, self._cache = device, cache
        self._late: list[tuple[int, Choice]] = []  # first word, what to put there
        words: list[int] = []
        numbers: list[float] = []
        for job in jobs:
            words += [job.base.data_ptr(), job.merged.data_ptr(), job.base.numel()]
            least = min(term.weight for term in job.terms)
            numbers += [job.divisor, float(job.op.setting.parameters.get("lambda", 1.0)), least]
            for term, kind in zip(job.terms, self.formula.kinds, strict=True):
                words += self._row(job, term, kind, len(words))
                numbers += [term.weight, term.weight]
        self.words = self._sent(torch.tensor(words))
        self.numbers = self._sent(torch.tensor(numbers, dtype=torch.float64).float())
        self._fill_in()
        self.weights: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.formula.rescaled:
            weights = torch.tensor([term.weight for job in jobs for term in job.terms], dtype=torch.float64)
            smallest = torch.tensor([SMALLEST_NORM], dtype=torch.float64)
            self.weights = self._sent(weights), self._sent(smallest)

    def _row(self, job: Job, term: Term, kind: int, begin: int) -> list[int]:
        """A term's words; `begin` is the place of the first one."""
        row = [term.held.data_ptr(), 0, 0, 0, 0, 0, *UNCUT]
        model, values = list(job.op.setting.models.items())[term.model]
        if kind == CUT:
            row[CUTS[0] :] = self._cut(job, term, model, begin)
        if kind in (HASHED, RANKED, RANKED_WIDE):
            row[3:6] = *keys_of(job.op.seeds[term.model]), threshold(values["density"])
        if kind in (RANKED, RANKED_WIDE):
            shape = tuple(job.base.shape)
            ranks = self._cache.get(
                (job.op.tensor, "once", ("row ranks", model)), lambda: row_ranks(term.delta[:], shape)
            )
            by_rank = self._sent(_limits(values["density"], values["epsilon"], row_length(shape)))
            self.kept += [ranks, by_rank]
            row[1:3] = ranks.data_ptr(), by_rank.data_ptr()
        return row

    def _cut(self, job: Job, term: Term, model: str, begin: int) -> list[int]:
        """The thresholds of one term, as `ties` and `breadcrumbs` find them."""
        values, n = job.op.setting.models[model], job.base.numel()
        early = "gamma" not in values
        if early:
            outliers, kept = 0, kept_of(values["density"], n)
        else:
            outliers, kept = counts_of(values["density"], values["gamma"], n)
        if kept == 0:
            return NOTHING
        delta = term.delta
        index = self._cache.get((job.op.tensor, "once", ("magnitudes", model)), lambda: MagnitudeIndex(delta))
        row = self._words(begin + CUTS[0], index.choice(delta, outliers + kept, early=early))
        inner = UNCUT[3:]
        if outliers:
            inner = self._words(begin + CUTS[1], index.choice(delta, outliers, early=early))
        return row + inner

    def _words(self, begin: int, found: Choice) -> list[int]:
        """What a cut's three words are, or will be."""
        if isinstance(found.word, torch.Tensor):
            self._late.append((begin, found))
            return [0, 0, 0]
        assert isinstance(found.before, int)
        limits = [max(found.word - 1, 0), found.word]
        self.tied |= found.before > 0
        return [found.before, *(limits if found.early else limits[::-1])]

    def _fill_in(self) -> None:
        """Put what was computed on the device into the tables, without looking at it."""
        if not self._late:
            return
        self.tied = True
        begins, found = zip(*self._late, strict=True)
        first = self._sent(torch.tensor(begins))
        late = self._sent(torch.tensor([int(not one.early) for one in found]))
        word = torch.stack([one.word for one in found])
        self.words[first] = torch.stack([one.before for one in found])
        self.words[first + 2 - late] = word
        self.words[first + 1 + late] = (word - 1).clamp_(min=0)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


@lru_cache(maxsize=64)
def _limits(density: float, epsilon: float, m: int) -> torch.Tensor:
    """`(m,)` uint32: what the hash of an entry must be below, by rank."""
    return thresholds(keep_probabilities(density, epsilon, m)).to(torch.uint32)
