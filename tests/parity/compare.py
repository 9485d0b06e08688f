"""What equal means: bits, a rounding step, or all but the choice among equal magnitudes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from evomerge.recipe import Setting
from evomerge.sources.source_set import SourceSet

Tensors = Mapping[str, torch.Tensor]
STEPS = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # one step of the two short ones
COUNTS: Counter[str] = Counter()  # entries, for the summary
CHOOSING = ("ties", "breadcrumbs", "breadcrumbs_ties")


def checked_form(theirs: Tensors, ours: Tensors) -> Tensors:
    """Theirs, once names, shapes and dtypes are equal to ours.

    One difference is mergekit's: it takes buffers of whole numbers for weights, scales them and writes them
    in the file's `dtype`. We copy them, and they are left out of the comparison.
    """
    assert set(theirs) == set(ours)
    theirs = {
        name: tensor if ours[name].is_floating_point() else ours[name] for name, tensor in theirs.items()
    }
    forms = {name: [(t.dtype, t.shape) for t in (theirs[name], ours[name])] for name in ours}
    assert {name: form for name, form in forms.items() if form[0] != form[1]} == {}
    return theirs


def unequal_bits(theirs: Tensors, ours: Tensors) -> dict[str, int]:
    """Entries per tensor that are not equal."""
    counts = {name: int((theirs[name] != ours[name]).sum()) for name in ours}
    return {name: count for name, count in counts.items() if count}


def beyond_rounding(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Entries further apart than 1e-6 of the tensor's largest in float32, and a step of the dtype written."""
    if not ours.is_floating_point():
        return torch.zeros(ours.shape, dtype=torch.bool)
    size = ours.double().abs()
    bound = size * STEPS[ours.dtype] + 1e-6 * float(size.max())
    return (theirs.double() - ours.double()).abs() > bound


def at_the_cut(sources: SourceSet, tensor: str, setting: Setting) -> torch.Tensor:
    """Entries that a model keeps or drops by a choice among magnitudes that occur more than once there.

    An adapter's task vector is known to mergekit up to the rounding of base + delta in float32; its
    magnitudes count as equal when they are no further apart. arcee_fusion has a threshold instead, of numbers
    that mergekit knows to the rounding of float32 only.
    """
    base = sources.base_tensor(tensor)
    unclear = torch.zeros(base.shape, dtype=torch.bool)
    if setting.method == "arcee_fusion":
        return _at_the_threshold(base, difference(sources, next(iter(setting.models)), tensor))
    if setting.method not in CHOOSING:
        return unclear
    for model, values in setting.models.items():
        delta = difference(sources, model, tensor)
        if values["density"] >= 1.0 or values["weight"] == 0.0:
            continue
        slack = 2.0**-23 * float(base.abs().max()) if "lora" in model else 0.0
        size = delta.abs()
        ordered = size.flatten().sort().values
        for place in _cuts(setting.method, values, len(ordered)):
            if 0 < place < len(ordered) and ordered[place] - ordered[place - 1] <= slack:
                unclear |= (size - ordered[place]).abs() <= slack
    return unclear


def _at_the_threshold(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Entries whose importance |d| KL is closer to the threshold than the error of a KL summed in float32.

    The terms of the sum are as large as the probabilities, which sum to 1, so its error is some 2**-22
    whatever its size.
    """
    p, q = (torch.softmax(x.double(), -1) + 1e-8 for x in (base.float() + delta, base.float()))
    importance = delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, middle, high = (ordered[(len(ordered) - 1) * quarter // 4] for quarter in (1, 2, 3))
    return (importance - middle - 1.5 * (high - low)).abs() <= 2.0**-21 * delta.abs()


def difference(sources: SourceSet, model: str, tensor: str) -> torch.Tensor:
    """Task vector of `near`, or of an adapter on it, `near+lora`."""
    total = torch.zeros(sources.base.tensors[tensor].shape)
    for part in model.split("+"):
        delta = None if part == sources.base_name else sources.delta(part, tensor)
        total += 0.0 if delta is None else delta
    return total


def _cuts(method: str, values: Mapping[str, float], n: int) -> Iterator[int]:
    """Positions in ascending order where what is kept begins or ends."""
    kept = int(values["density"] * n)
    if method == "ties":
        yield n - max(1, kept)
        return
    top = min(int(values["gamma"] * n), n - kept)
    yield n - kept - top
    yield n - top
