"""The k largest magnitudes against a stable sort."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from evomerge.merge.magnitude import BLOCK, MagnitudeIndex


def bf16_delta(n: int, seed: int) -> torch.Tensor:
    """The difference of two bfloat16 tensors: few distinct magnitudes, many zeros."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(n, generator=generator) * 0.05).bfloat16()
    moved = (base.float() + torch.randn(n, generator=generator) * 2e-4).bfloat16()
    return moved.float() - base.float()


DELTAS = {
    "distinct": torch.randn(40_001, generator=torch.Generator().manual_seed(0)),
    "bf16": bf16_delta(40_001, 1),
    "few values": torch.randint(-3, 4, (3000,), generator=torch.Generator().manual_seed(2)).float(),
    "zeros": torch.zeros(600),
    "mostly zeros": torch.eye(40).flatten(),
    "one entry": torch.tensor([-2.0]),
    "two blocks": torch.randn(BLOCK + 9, generator=torch.Generator().manual_seed(3)),
    "denormal": torch.tensor([1e-45, -1e-45, 0.0, 3e-45, 1.0]),
    "float64": torch.randn(2000, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
}


def stable_keeps(delta: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """`(k, mask of the k largest)` for telling values of k, by a stable sort."""
    order = torch.sort(delta.abs(), descending=True, stable=True).indices
    for k in some_counts(delta.numel()):
        keep = torch.zeros(delta.numel(), dtype=torch.bool)
        keep[order[:k]] = True
        yield k, keep


def some_counts(n: int) -> list[int]:
    fractions = [int(n * f) for f in (0.001, 0.05, 0.2, 0.37, 0.5, 0.8, 0.99)]
    return sorted({k for k in [1, 2, 255, 256, 257, 512, n - 1, n, *fractions] if 1 <= k <= n})


@pytest.mark.parametrize("name", DELTAS)
def test_the_cut_keeps_what_a_stable_sort_keeps(name):
    delta = DELTAS[name]
    index = MagnitudeIndex(delta)
    place = torch.arange(delta.numel())
    for k, expected in stable_keeps(delta):
        cut = index.largest(delta, k)
        size = delta.abs()
        keep = (size > cut.threshold) | ((size == cut.threshold) & (place <= cut.last))
        assert torch.equal(keep, expected), k


@pytest.mark.parametrize("name", DELTAS)
def test_writing_a_cut_zeroes_the_rest(name):
    delta = DELTAS[name]
    index = MagnitudeIndex(delta)
    for k, keep in stable_keeps(delta):
        out = torch.full_like(delta, 9.0)
        cut = index.largest(delta, k)
        for low in range(0, delta.numel(), 777):
            high = min(low + 777, delta.numel())
            cut.write(delta, low, high, out[low:high])
        assert torch.equal(out, delta * keep), k


def ascending_band(delta: torch.Tensor, above: int, k: int) -> torch.Tensor:
    """Mask of the `k` entries below the `above` largest in a stable ascending sort."""
    order = torch.sort(delta.abs(), stable=True).indices
    keep = torch.zeros(delta.numel(), dtype=torch.bool)
    keep[order[delta.numel() - above - k : delta.numel() - above]] = True
    return keep


@pytest.mark.parametrize("name", [name for name in DELTAS if name != "one entry"])
def test_a_band_holds_the_ranks_of_a_stable_ascending_sort(name):
    delta = DELTAS[name]
    index, n = MagnitudeIndex(delta), delta.numel()
    for above, k in [(0, n), (0, 1), (1, 1), (1, n - 1), (n - 1, 1), (n // 3, n // 2), (n // 50, n // 5 + 1)]:
        band = index.between(delta, above, k)
        out = torch.full_like(delta, 9.0)
        for low in range(0, n, 777):
            band.write(delta, low, min(low + 777, n), out[low : low + 777])
        assert torch.equal(out, delta * ascending_band(delta, above, k)), (above, k)


def test_every_count_of_a_small_tensor_is_exact():
    delta = bf16_delta(700, 5)
    index = MagnitudeIndex(delta)
    for k in range(1, 701):
        cut = index.largest(delta, k)
        kept = (delta.abs() > cut.threshold).sum() + (delta.abs()[: cut.last + 1] == cut.threshold).sum()
        assert kept == k


def test_the_index_of_a_million_entries_is_small():
    delta = torch.randn(1_000_000, generator=torch.Generator().manual_seed(6))
    assert MagnitudeIndex(delta).nbytes < delta.nbytes / 100


def test_counting_in_several_steps_gives_the_same_cut(monkeypatch):
    delta = DELTAS["bf16"]
    whole = MagnitudeIndex(delta)
    monkeypatch.setattr("evomerge.merge.magnitude.COUNTED", 777)
    parts = MagnitudeIndex(delta)
    assert [parts.largest(delta, k) for k in (1, 300, 9000)] == [
        whole.largest(delta, k) for k in (1, 300, 9000)
    ]


def test_the_late_choice_keeps_exactly_the_last_of_equal_magnitudes():
    delta = bf16_delta(300, 7)
    index, size, place = MagnitudeIndex(delta), delta.abs(), torch.arange(300)
    for k in range(1, 301):
        cut = index.largest(delta, k, early=False)
        keep = (size > cut.threshold) | ((size == cut.threshold) & (place > cut.last))
        assert torch.equal(keep, ascending_band(delta, 0, k)), k


def test_indexing_does_not_change_the_task_vector():
    delta = -torch.arange(5.0)
    MagnitudeIndex(delta)
    assert torch.equal(delta, -torch.arange(5.0))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", DELTAS)
def test_thresholds_found_on_a_device_are_those_found_on_the_host(name, early):
    delta = DELTAS[name]
    index = MagnitudeIndex(delta)
    for k in some_counts(delta.numel()):
        cut, chosen = index.largest(delta, k, early=early), index.chosen(delta, k, early=early)
        kept = torch.empty_like(delta)
        cut.write(delta, 0, delta.numel(), kept)
        before = torch.arange(delta.numel()) < chosen.place
        limit = torch.where(before, chosen.first, chosen.second)
        assert torch.equal(torch.where(delta.abs() > limit, delta, 0.0), kept), k
