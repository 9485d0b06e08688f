"""The accelerator's kernels give the bits of the CPU, on a device. Not yet run on a device.

The same properties as in `tests/merge/test_device_kernels.py`, on larger tensors, and what only a device has:
streams, pinned memory, compiled code.
"""

from __future__ import annotations

import random

import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge import device_pass
from evomerge.merge.magnitude import MagnitudeIndex
from evomerge.merge.merger import Merger
from evomerge.recipe import Setting
from tests import kernels
from tests.kernels import DTYPES, METHODS, NAMES, KernelSources, by_cpu, plan_of, random_setting, same_bits

pytestmark = pytest.mark.gpu
pytest.importorskip("triton", reason="the kernels are written in Triton")
LARGE = {NAMES[0]: (1500, 1111), NAMES[1]: (512, 512), NAMES[2]: (300, 2048), NAMES[3]: (513,)}
GPU = torch.device("cuda")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in LARGE.items():
        monkeypatch.setitem(kernels.SHAPES, name, shape)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_bits_are_those_of_the_cpu(name, dtype):
    rng, sources = random.Random(f"{name} {dtype}"), KernelSources(dtype)
    merger = Merger(sources, device=GPU, cache_bytes=1 << 30)
    assert merger.fused_on_device
    for seed in range(8):
        plan = plan_of(setting := random_setting(name, rng), seed)
        expected = by_cpu(sources, plan)
        for tensor, found in merger.materialize(plan):
            assert same_bits(found, expected[tensor]), (tensor, setting)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("linear", "task_arithmetic")])
def test_rescaled_results_are_those_of_the_cpu(name):
    rng, sources = random.Random(name), KernelSources(torch.float32)
    for seed in range(4):
        plan = plan_of(random_setting(name, rng, rescale=True), seed)
        expected = by_cpu(sources, plan)
        for tensor, found in Merger(sources, device=GPU).materialize(plan):
            assert same_bits(found, expected[tensor]), tensor


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("cache", "host"), [(0, 0), (0, 1 << 30), (4 << 20, 0), (4 << 20, 1 << 30)])
def test_sources_that_do_not_fit_the_card_arrive_in_time(cache, host, monkeypatch):
    """A kernel that did not wait for its copies would merge what was there before."""
    monkeypatch.setattr(device_pass, "WINDOW", 1 << 20)
    rng, sources = random.Random(0), KernelSources(torch.bfloat16)
    merger = Merger(sources, device=GPU, cache_bytes=cache, host_bytes=host)
    for seed, name in enumerate((*METHODS, *METHODS)):
        plan = plan_of(random_setting(name, rng), seed)
        expected = by_cpu(sources, plan)
        for tensor, found in merger.materialize(plan):
            assert same_bits(found, expected[tensor]), (tensor, name)


def test_a_candidate_does_not_wait_for_the_device_before_its_results_are_asked_for():
    sources = KernelSources(torch.bfloat16)
    merger = Merger(sources, device=GPU, cache_bytes=1 << 30)
    for name in ("linear", "ties", "dare_ties", "della", "breadcrumbs"):
        plan = plan_of(random_setting(name, random.Random(name)))
        dict(merger.materialize(plan))  # what depends on the sources alone is computed once, with waiting
        torch.cuda.set_sync_debug_mode("error")
        try:
            dict(merger.materialize(plan))  # waits for events, which are no synchronisation of the device
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.39e38])
def test_the_first_tensor_that_is_not_finite_is_named(value):
    sources = KernelSources(torch.bfloat16)
    sources.own["full", NAMES[1]].view(-1)[-1] = value
    sources.base[NAMES[1]].view(-1)[-1] = 0.0
    setting = Setting("task_arithmetic", {"normalize": False}, {"full": {"weight": 2.0}})
    with pytest.raises(RecipeError, match=f"tensor `{NAMES[1]}`: task_arithmetic gives values"):
        dict(Merger(sources, device=GPU).materialize(plan_of(setting)))


def test_thresholds_found_on_the_device_are_those_found_on_the_cpu():
    delta = (torch.randn(300_007, generator=torch.Generator().manual_seed(0)) * 40).round() / 64
    there = delta.to(GPU)
    here_index, there_index = MagnitudeIndex(delta), MagnitudeIndex(there)
    for k in (1, 1000, 150_000, 290_000, 300_007):
        for early in (True, False):
            found = [int(x) for x in there_index.choice(there, k, early=early)]
            assert found == [int(x) for x in here_index.choice(delta, k, early=early)]
