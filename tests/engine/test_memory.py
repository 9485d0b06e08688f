"""What a merger keeps on a card, in pinned memory and in files."""

from __future__ import annotations

import pytest

from evomerge.engine import memory

GB = 10**9


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A machine with 200 GB of free memory."""

    class Memory:
        available = 200 * GB

    monkeypatch.setattr("psutil.virtual_memory", Memory)


@pytest.mark.parametrize(
    ("deltas", "workers", "device", "pinned"),
    [(10, 1, 10, 0), (50, 1, 33.6, 16.4), (500, 1, 33.6, 100), (500, 2, 33.6, 50)],
)
def test_what_does_not_fit_beside_vllm_stays_in_pinned_memory_as_far_as_that_reaches(
    deltas, workers, device, pinned
):
    """Of 80 GB vLLM keeps half, and 8 % are for work; of the host's memory half, shared by the workers."""
    plan = memory.plan_accelerator(80 * GB, 15 * GB * workers, deltas * GB, workers=workers)
    assert (plan.place, plan.cache_bytes / GB) == ("device", pytest.approx(device))
    assert plan.host_bytes / GB == pytest.approx(pinned)
    assert plan.vllm_share == pytest.approx(0.92 - device / 80, abs=1e-3)


def test_a_card_without_room_leaves_everything_in_pinned_memory():
    plan = memory.plan_accelerator(80 * GB, 60 * GB, 50 * GB)
    assert (plan.place, plan.cache_bytes, plan.host_bytes) == ("host", 0, 50 * GB)
    assert str(plan) == "0.00 GB kept in host, 50.00 GB in pinned memory"


def test_beside_transformers_half_of_what_is_free_is_kept_or_what_the_user_says():
    assert memory.plan_shared_card(60 * GB, None) == memory.MemoryPlan("device", 30 * GB, 100 * GB)
    assert memory.plan_shared_card(60 * GB, 5).cache_bytes == 5 * GB
    assert memory.plan_host(None, 4) == memory.MemoryPlan("host", 25 * GB)
    assert memory.plan_host(8, 4).cache_bytes == 2 * GB
