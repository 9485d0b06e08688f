"""The k largest magnitudes against a stable sort, counted by the compiled loops and by torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from evomerge.merge import scans
from evomerge.merge.compiled import available
from evomerge.merge.magnitude import Cut, MagnitudeIndex
from evomerge.sources.streamed import RawDelta, TaskVector


def raw_delta(n: int, seed: int, moved: float = 2e-4) -> RawDelta:
    """Of two bfloat16 tensors."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(n, generator=generator) * 0.05).bfloat16()
    return RawDelta((base.float() + torch.randn(n, generator=generator) * moved).bfloat16(), base)


def bf16_delta(n: int, seed: int) -> torch.Tensor:
    """The difference of two bfloat16 tensors: few distinct magnitudes, many zeros."""
    return raw_delta(n, seed)[:]


@pytest.fixture(params=["compiled", "torch", "accelerator"], autouse=True)
def way(request, monkeypatch):
    """Who scans the task vectors."""
    if request.param != "compiled":
        monkeypatch.setattr(scans, "readable", lambda delta: False)
        monkeypatch.setattr(scans, "remembered", lambda delta: request.param == "accelerator")
    elif not available():
        pytest.skip("the loops are compiled by numba")
    return request.param


DELTAS = {
    "distinct": torch.randn(40_001, generator=torch.Generator().manual_seed(0)),
    "bf16": bf16_delta(40_001, 1),
    "few values": torch.randint(-3, 4, (3000,), generator=torch.Generator().manual_seed(2)).float(),
    "zeros": torch.zeros(600),
    "mostly zeros": torch.eye(40).flatten(),
    "one entry": torch.tensor([-2.0]),
    "two blocks": torch.randn(70_001, generator=torch.Generator().manual_seed(3)),
    "raw": raw_delta(40_001, 8),
    "raw, far from the base": raw_delta(9_001, 9, moved=0.3),
    "denormal": torch.tensor([1e-45, -1e-45, 0.0, 3e-45, 1.0]),
    "float64": torch.randn(2000, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
}


def stable_keeps(delta: TaskVector) -> Iterator[tuple[int, torch.Tensor]]:
    """`(k, mask of the k largest)` for telling values of k, by a stable sort."""
    order = torch.sort(delta[:].abs(), descending=True, stable=True).indices
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
    index, entries = MagnitudeIndex(delta), delta[:]
    for k, expected in stable_keeps(delta):
        # a cut keeps all zeros or none, which is the same
        assert torch.equal(entries * kept(entries, index.largest(delta, k)), entries * expected), k


def kept(delta: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Mask of what a cut keeps, from its attributes' definitions."""
    size, place = delta.abs(), torch.arange(delta.numel())
    return (size > cut.threshold) | ((size == cut.threshold) & ((place <= cut.last) == cut.early))


@pytest.mark.parametrize("name", DELTAS)
def test_writing_a_cut_zeroes_the_rest(name):
    delta = DELTAS[name]
    index = MagnitudeIndex(delta)
    for k, keep in stable_keeps(delta):
        out = torch.full_like(delta[:], 9.0)
        cut = index.largest(delta, k)
        for low in range(0, delta.numel(), 777):
            high = min(low + 777, delta.numel())
            cut.write(delta, low, high, out[low:high])
        assert torch.equal(out, delta[:] * keep), k


def ascending_band(delta: TaskVector, above: int, k: int) -> torch.Tensor:
    """Mask of the `k` entries below the `above` largest in a stable ascending sort."""
    order = torch.sort(delta[:].abs(), stable=True).indices
    keep = torch.zeros(delta.numel(), dtype=torch.bool)
    keep[order[delta.numel() - above - k : delta.numel() - above]] = True
    return keep


@pytest.mark.parametrize("name", [name for name in DELTAS if name != "one entry"])
def test_a_band_holds_the_ranks_of_a_stable_ascending_sort(name):
    delta = DELTAS[name]
    index, n = MagnitudeIndex(delta), delta.numel()
    for above, k in [(0, n), (0, 1), (1, 1), (1, n - 1), (n - 1, 1), (n // 3, n // 2), (n // 50, n // 5 + 1)]:
        band = index.between(delta, above, k)
        out = torch.full_like(delta[:], 9.0)
        for low in range(0, n, 777):
            band.write(delta, low, min(low + 777, n), out[low : low + 777])
        assert torch.equal(out, delta[:] * ascending_band(delta, above, k)), (above, k)


@pytest.mark.parametrize("delta", [raw_delta(700, 5, moved=0.02), bf16_delta(700, 5)], ids=["raw", "float32"])
def test_every_count_of_a_small_tensor_is_exact(delta):
    index, entries = MagnitudeIndex(delta), delta[:]
    for k in range(1, int(entries.count_nonzero()) + 1):
        assert kept(entries, index.largest(delta, k)).sum() == k


def test_the_index_of_a_million_entries_is_small():
    delta = torch.randn(1_000_000, generator=torch.Generator().manual_seed(6))
    assert MagnitudeIndex(delta).nbytes < delta.nbytes / 100
    raw = raw_delta(1_000_000, 6)
    assert MagnitudeIndex(raw).nbytes < raw.source.nbytes / 4


def test_counting_in_several_steps_gives_the_same_cut(monkeypatch):
    delta = DELTAS["bf16"]
    whole = MagnitudeIndex(delta)
    cuts = [whole.largest(delta, k) for k in (1, 300, 9000)]
    monkeypatch.setattr(scans, "COUNTED", 777)
    monkeypatch.setattr("evomerge.merge.workers.SHARED", 1)
    torch.set_num_threads(3)
    parts = MagnitudeIndex(delta)
    assert [parts.largest(delta, k) for k in (1, 300, 9000)] == cuts


@pytest.mark.parametrize("name", [name for name in DELTAS if DELTAS[name].dtype == torch.float32])
def test_the_loops_and_torch_find_the_same_cut(name, monkeypatch):
    delta = DELTAS[name]
    counts = some_counts(delta.numel())
    cuts = [MagnitudeIndex(delta).largest(delta, k) for k in counts]
    monkeypatch.setattr(scans, "readable", lambda delta: False)
    index = MagnitudeIndex(delta)
    assert [index.largest(delta, k) for k in counts] == cuts


def test_the_late_choice_keeps_exactly_the_last_of_equal_magnitudes():
    delta = bf16_delta(300, 7)
    index = MagnitudeIndex(delta)
    for k in range(1, 301):
        cut = index.largest(delta, k, early=False)
        assert torch.equal(delta * kept(delta, cut), delta * ascending_band(delta, 0, k)), k


def test_indexing_does_not_change_the_task_vector():
    delta = -torch.arange(5.0)
    MagnitudeIndex(delta)
    assert torch.equal(delta, -torch.arange(5.0))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", DELTAS)
def test_the_choice_is_that_of_the_cut_whether_or_not_magnitudes_are_remembered(name, early, monkeypatch):
    delta = DELTAS[name]
    size, known = delta[:].abs(), MagnitudeIndex(delta)
    monkeypatch.setattr("evomerge.merge.magnitude.WORTH", 1 << 60)
    for index in (known, MagnitudeIndex(delta)):
        for k in some_counts(delta.numel()):
            cut, found = known.largest(delta, k, early=early), index.choice(delta, k, early=early)
            assert scans.magnitude(delta, int(found.word)) == cut.threshold
            assert found.early == cut.early
            if cut.threshold:
                assert int(found.before) == int((size[: cut.last + 1] == cut.threshold).sum()), k


def test_a_threshold_that_is_remembered_is_a_number_of_the_host(way):
    delta = bf16_delta(40_001, 1)
    found = MagnitudeIndex(delta).choice(delta, 8000).word
    assert isinstance(found, torch.Tensor if way == "torch" else int)
