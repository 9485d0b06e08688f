"""What the kernels of `evomerge.merge._triton` are told: a formula for a launch, rows of numbers per tensor.

The numbers are those that `evomerge.merge.methods` settle, in the same order and rounding; the ones that
depend on whole tensors (thresholds, norms) stay on the device.

Has not run on a GPU yet: checked in Triton's interpreter.

Imports: torch, `evomerge.merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from evomerge.merge.device_sources import Cache, Part
from evomerge.merge.magnitude import Chosen, MagnitudeIndex
from evomerge.merge.mask import hash_words, limits_of
from evomerge.merge.methods._gta import SMALLEST_NORM, divisor_of
from evomerge.merge.methods.della import keep_probabilities, row_length, row_ranks
from evomerge.merge.methods.linear import SMALLEST_SUM
from evomerge.merge.plan import TensorOp

# columns of the tables, of a tensor and of each of its terms
WORDS, TERM_WORDS = 3, 8  # base, result, n; source, ranks, limits by rank, 2 keys, limit, 2 places
NUMBERS, TERM_NUMBERS = 3, 6  # divisor, scale, least weight; factor, weight, 2 outer and 2 inner limits

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
INFINITE = float("inf")


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
        part: its tensor.
        weight: before rescaling.
    """

    model: int
    part: Part
    weight: float


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
    def of(cls, op: TensorOp, base: torch.Tensor, parts: Sequence[Part | None]) -> Job | None:
        """The job of an operation, `parts` by its models; None where torch has to merge the tensor."""
        values, shared = list(op.setting.models.values()), op.setting.parameters
        weights = [one["weight"] for one in values]
        kind, consensus = FAMILY[op.setting.method]
        normalized = bool(shared["normalize"])
        if all(part is None for part in parts) or len(parts) > MOST_TERMS:
            return None
        if op.setting.method == "linear":
            same = Part(base.reshape(-1), raw=True)
            terms = [Term(k, part or same, weights[k]) for k, part in enumerate(parts)]
            divisor = float(torch.tensor(weights).sum()) if normalized else 1.0
            mode = AVERAGE
            if abs(divisor) < SMALLEST_SUM:
                return None
        else:
            terms = [Term(k, part, weights[k]) for k, part in enumerate(parts) if part and weights[k]]
            if not terms:
                return None
            divisor = divisor_of([term.weight for term in terms], weights, normalized, consensus)
            elected = ELECT_NORMALIZED if normalized else ELECT
            mode = elected if consensus and len(terms) > 1 else SUM
        kinds = tuple(_kind(kind, values[term.model], tuple(base.shape)) for term in terms)
        raws = tuple(term.part.raw for term in terms)
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
    """

    def __init__(self, jobs: list[Job], device: torch.device, cache: Cache) -> None:
        self.jobs, self.formula = jobs, jobs[0].formula
        self.kept: list[torch.Tensor] = []
        self._device, self._cache = device, cache
        self._late: list[tuple[int, int, Chosen]] = []  # first word, first number, what to put there
        words: list[int] = []
        numbers: list[float] = []
        for job in jobs:
            words += [job.base.data_ptr(), job.merged.data_ptr(), job.base.numel()]
            least = min(term.weight for term in job.terms)
            numbers += [job.divisor, float(job.op.setting.parameters.get("lambda", 1.0)), least]
            for term, kind in zip(job.terms, self.formula.kinds, strict=True):
                row, limits = self._row(job, term, kind, len(words), len(numbers))
                words += row
                numbers += [term.weight, term.weight, *limits]
        self.words = self._sent(torch.tensor(words))
        self.numbers = self._sent(torch.tensor(numbers, dtype=torch.float64).float())
        self._fill_in()
        self.weights: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.formula.rescaled:
            weights = torch.tensor([term.weight for job in jobs for term in job.terms], dtype=torch.float64)
            smallest = torch.tensor([SMALLEST_NORM], dtype=torch.float64)
            self.weights = self._sent(weights), self._sent(smallest)

    def _row(self, job: Job, term: Term, kind: int, word: int, number: int) -> tuple[list[int], list[float]]:
        """A term's words and limits; `word` and `number` are the places of its first ones."""
        row, limits = [term.part.tensor.data_ptr()] + [0] * (TERM_WORDS - 1), [-1.0, -1.0, INFINITE, INFINITE]
        model, values = list(job.op.setting.models.items())[term.model]
        if kind == CUT:
            limits = self._cut(job, term, model, word, number) or limits
        if kind in (HASHED, RANKED, RANKED_WIDE):
            row[3:6] = hash_words(job.op.seeds[term.model], values["density"])
        if kind in (RANKED, RANKED_WIDE):
            shape = tuple(job.base.shape)
            ranks = self._cache.get(
                (job.op.tensor, "once", ("row ranks", model)),
                lambda: row_ranks(term.part.delta(job.base.reshape(-1)), shape),
            )
            by_rank = self._sent(_limits(values["density"], values["epsilon"], row_length(shape)))
            self.kept += [ranks, by_rank]
            row[1:3] = ranks.data_ptr(), by_rank.data_ptr()
        return row, limits

    def _cut(self, job: Job, term: Term, model: str, word: int, number: int) -> list[float] | None:
        """Find the thresholds of one term, as `ties` and `breadcrumbs` do; limits where nothing is kept."""
        values, n = job.op.setting.models[model], job.base.numel()
        early, outliers = "gamma" not in values, 0
        kept = int(values["density"] * n)
        if early:
            kept = max(1, kept)
        elif kept == 0:
            return [INFINITE] * 4
        else:
            outliers = min(int(values["gamma"] * n), n - kept)
        delta = term.part.delta(job.base.reshape(-1))
        index = self._cache.get((job.op.tensor, "once", ("magnitudes", model)), lambda: MagnitudeIndex(delta))
        self._late.append((word + 6, number + 2, index.chosen(delta, outliers + kept, early=early)))
        if outliers:
            self._late.append((word + 7, number + 4, index.chosen(delta, outliers, early=early)))
        return None

    def _fill_in(self) -> None:
        """Put what was computed on the device into the tables, without looking at it."""
        if not self._late:
            return
        words, numbers, found = zip(*self._late, strict=True)
        self.words[self._sent(torch.tensor(words))] = torch.stack([one.place for one in found])
        first = self._sent(torch.tensor(numbers))
        self.numbers[first] = torch.stack([one.first for one in found])
        self.numbers[first + 1] = torch.stack([one.second for one in found])

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


@lru_cache(maxsize=64)
def _limits(density: float, epsilon: float, m: int) -> torch.Tensor:
    """`(m,)` int32: what the hash of an entry must be below, by rank."""
    return limits_of(keep_probabilities(density, epsilon, m))
