"""The compiled loops give the bits of the torch kernels."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from evomerge.merge import compiled, fused
from evomerge.merge.methods import METHODS, SPECS
from evomerge.merge.methods._method import CHUNK, TensorInputs
from evomerge.recipe import Setting

pytest.importorskip("numba", reason="the loops are compiled by numba")

FAMILY = [name for name, spec in SPECS.items() if {"weight", "lambda"} <= {*spec.per_model, *spec.shared}]
FUSED = [name for name in ("linear", *FAMILY) if METHODS[name].streams]
N = 70_001  # more than a chunk, and no multiple of a block


def inputs_of(setting: Setting, dtype: torch.dtype, seed: int) -> TensorInputs:
    """Random task vectors with zeros and equal magnitudes among them; the last model may change nothing."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(N, generator=generator).mul_(0.1).to(dtype)
    coarse = torch.randint(-3, 4, (N,), generator=generator).float() / 64
    fine = torch.randn(2, N, generator=generator) * 0.02
    fine[1, ::7] = 0.0
    deltas = [fine[0], coarse, fine[1], None][: len(setting.models)]
    spec = SPECS[setting.method]
    return TensorInputs(
        base=base,
        deltas=deltas,
        setting=spec.complete(setting, "test"),
        dtype=torch.float32,
        shape=(N,),
        seeds=tuple(range(len(deltas))) if spec.random else (),
    )


def random_setting(name: str, rng: random.Random) -> Setting:
    spec = SPECS[name]

    def values() -> dict[str, float]:
        density = rng.choice([1.0, 0.5, 0.2, 0.85, 1e-9])
        found = {"weight": rng.choice([1.0, 0.3, -0.4, 0.0, 1.7]), "density": density, "gamma": 0.03}
        found["epsilon"] = 0.0 if density in (1.0, 1e-9) else rng.choice([0.0, 0.1])
        return {key: found[key] for key in spec.per_model}

    shared = {
        "lambda": rng.choice([1.0, 0.7]),
        "normalize": rng.random() < 0.5,
        "rescale": rng.random() < 0.3,
    }
    models = {model: values() for model in "abcd"[: rng.randint(1, 4)]}
    if name == "linear":
        models["a"]["weight"] = 5.0  # no sum of zero
    return Setting(name, {key: shared[key] for key in spec.shared}, models)


def by_torch(inputs: TensorInputs) -> torch.Tensor:
    kernel = METHODS[inputs.setting.method].kernel(inputs)
    merged = torch.empty_like(inputs.base)
    for low in range(0, N, CHUNK):
        high = min(low + CHUNK, N)
        part = inputs.base[low:high].to(torch.float32, copy=True)
        kernel(low, high, part)
        merged[low:high].copy_(part)
    return merged


def by_numba(inputs: TensorInputs) -> tuple[torch.Tensor, bool] | None:
    kernel = METHODS[inputs.setting.method].kernel(inputs)
    if not fused.fits(kernel, inputs.base):
        return None
    merged = torch.empty_like(inputs.base)
    return merged, fused.merge(kernel, inputs.base, merged)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    words = torch.int16 if one.dtype == torch.bfloat16 else torch.int32
    return torch.equal(one.view(words), other.view(words))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_the_bits_are_those_of_torch(name, dtype):
    rng = random.Random(name)
    merged = 0
    for seed in range(12):
        inputs = inputs_of(random_setting(name, rng), dtype, seed)
        found = by_numba(inputs)
        if found is not None:  # without a term there is nothing to fuse
            merged += 1
            assert same_bits(found[0], by_torch(inputs)), inputs.setting
            assert found[1]
    assert merged > 8


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_results_that_are_not_finite_are_noticed(name, value):
    """3.4e38 is finite in float32 and overflows when rounded to bfloat16."""
    models = {model: {"weight": 1.0} for model in "ab"}
    inputs = inputs_of(Setting(name, {"normalize": False}, models), torch.bfloat16, 0)
    assert by_numba(inputs)[1]
    inputs.deltas[0][N - 3] = value
    assert not by_numba(inputs)[1]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_a_bit(threads, monkeypatch):
    setting = Setting("ties", {}, {m: {"weight": 0.5, "density": 0.3} for m in "abc"})
    inputs = inputs_of(setting, torch.bfloat16, 1)
    monkeypatch.setattr(compiled, "SHARED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert same_bits(by_numba(inputs)[0], by_torch(inputs))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_members_are_the_positions_that_numpy_finds(kind):
    bits = np.random.default_rng(0).integers(0, 1 << 20, 100_003).astype(kind)
    expected = np.flatnonzero((bits & 0xFF00) == 0x1200)
    assert np.array_equal(compiled.members(bits, 0xFF00, 0x1200), expected)


@pytest.mark.parametrize("change", ["float16", "float64", "streamed"])
def test_what_the_loops_cannot_do_is_left_to_torch(change):
    setting = Setting("task_arithmetic", {}, {"a": {"weight": 1.0}})
    dtype = torch.bfloat16 if change == "streamed" else getattr(torch, change)
    inputs = inputs_of(setting, dtype, 0)
    if change == "streamed":
        inputs.deltas[0] = object()
    kernel = METHODS["task_arithmetic"].kernel(inputs)
    assert not fused.fits(kernel, inputs.base)


def test_a_sparsifier_that_the_loops_do_not_know_is_left_to_torch():
    inputs = inputs_of(Setting("task_arithmetic", {}, {"a": {"weight": 1.0}}), torch.bfloat16, 0)
    kernel = METHODS["task_arithmetic"].kernel(inputs)
    (term,) = kernel.terms
    assert fused.fits(kernel, inputs.base)
    assert not fused.fits(replace(kernel, terms=(replace(term, kept=object()),)), inputs.base)


def test_without_numba_torch_merges(monkeypatch):
    monkeypatch.setattr(fused, "available", lambda: False)
    setting = Setting("task_arithmetic", {}, {"a": {"weight": 1.0}})
    assert by_numba(inputs_of(setting, torch.bfloat16, 0)) is None
