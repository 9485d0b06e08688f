"""The accelerator's kernels give the bits of the CPU, run by Triton's interpreter.

The interpreter is chosen when a process first imports Triton, so these tests run in a process of their own,
started by the last one; alone: `TRITON_INTERPRET=1 python -m pytest tests/merge/test_device_kernels.py`.
`tests/gpu/test_kernels.py` has the same properties for a device.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge import device_pass
from evomerge.merge.merger import Merger
from evomerge.recipe import Setting
from tests.kernels import (
    DTYPES,
    METHODS,
    NAMES,
    DeltaSources,
    KernelSources,
    by_cpu,
    plan_of,
    random_setting,
    same_bits,
)

ROOT = Path(__file__).parents[2]
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = version("triton") if importlib.util.find_spec("triton") else ""
interpreted = pytest.mark.skipif(not INSIDE, reason="runs in the process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INSIDE or not TRITON, reason="Triton is not installed: `pip install triton`")


def by_kernel(sources: KernelSources, plan: object) -> dict[str, torch.Tensor]:
    merger = Merger(sources, cache_bytes=1 << 30)
    assert merger.fused_on_device
    return dict(merger.materialize(plan))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], note: object) -> None:
    assert list(found) == list(expected)
    for name in NAMES:
        assert same_bits(found[name], expected[name]), (name, note)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_bits_are_those_of_the_cpu(name, dtype):
    rng, sources = random.Random(f"{name} {dtype}"), KernelSources(dtype)
    for seed in range(3 if dtype == torch.bfloat16 else 1):
        setting = random_setting(name, rng)
        assert_same(by_kernel(sources, plan := plan_of(setting, seed)), by_cpu(sources, plan), setting)


@interpreted
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("linear", "task_arithmetic")])
def test_rescaled_results_are_within_a_unit_of_the_last_place(name):
    """Norms are summed in another order in float64: a factor may round to the neighbouring float32."""
    rng, sources = random.Random(name), KernelSources(torch.float32)
    for seed in range(2):
        plan = plan_of(random_setting(name, rng, rescale=True), seed)
        expected = by_cpu(sources, plan)
        for tensor, found in by_kernel(sources, plan).items():
            torch.testing.assert_close(found, expected[tensor], rtol=2**-22, atol=2**-26)


@interpreted
@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "della", "breadcrumbs"])
def test_task_vectors_in_float32_give_the_bits_of_whole_tensors(name):
    plan = plan_of(random_setting(name, random.Random(name)))
    whole = by_kernel(KernelSources(torch.bfloat16), plan)
    assert_same(by_kernel(DeltaSources(torch.bfloat16), plan), whole, plan)


@interpreted
@pytest.mark.parametrize("size", [1, 10_000])
def test_windows_of_any_size_and_a_method_per_tensor_give_the_same_bits(size, monkeypatch):
    """`slerp` is left to torch, in its place."""
    monkeypatch.setattr(device_pass, "WINDOW", size)
    rng, sources = random.Random(0), KernelSources(torch.bfloat16)
    slerp = Setting("slerp", {"t": 0.4}, {"full": {}, "coarse": {}})
    settings = [
        random_setting("ties", rng),
        slerp,
        random_setting("linear", rng),
        random_setting("ties", rng),
    ]
    assert_same(by_kernel(sources, plan := plan_of(settings)), by_cpu(sources, plan), settings)


@interpreted
@pytest.mark.parametrize("cache", [0, 20_000, 1 << 30])
def test_candidates_after_the_first_do_not_depend_on_what_is_cached(cache):
    rng, sources = random.Random(1), KernelSources(torch.bfloat16)
    merger = Merger(sources, cache_bytes=cache, host_bytes=cache)
    for name in ("ties", "della", "ties", "dare_linear"):
        plan = plan_of(random_setting(name, rng))
        assert_same(dict(merger.materialize(plan)), by_cpu(sources, plan), name)


@interpreted
def test_whole_tensors_take_half_the_memory_of_task_vectors():
    setting = Setting("linear", {}, {"full": {"weight": 1.0}, "coarse": {"weight": 1.0}})
    held = []
    for sources in (KernelSources(torch.bfloat16), DeltaSources(torch.bfloat16)):
        merger = Merger(sources, cache_bytes=1 << 30)
        dict(merger.materialize(plan_of(setting)))
        held.append(merger.cached_bytes)
    entries = sum(tensor.numel() for tensor in sources.base.values())
    assert held == [entries * (2 + 2 * 2), entries * (2 + 2 * 4)]


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("name", ["linear", "ties"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.39e38])
def test_the_first_tensor_that_is_not_finite_is_named_and_those_before_it_are_given(name, value):
    sources = KernelSources(torch.bfloat16)
    for tensor in NAMES[1:3]:
        sources.own["full", tensor].view(-1)[-1] = value
        sources.base[tensor].view(-1)[-1] = 0.0
    setting = Setting(name, {"normalize": False}, {"full": {"weight": 2.0}})  # twice 3.39e38 is infinite
    merged = Merger(sources).materialize(plan_of(setting))
    assert next(merged)[0] == NAMES[0]
    with pytest.raises(RecipeError, match=f"tensor `{NAMES[1]}`: {name} gives values that are not finite"):
        next(merged)


@interpreted
def test_weights_that_sum_to_zero_are_refused_as_on_the_cpu():
    weights = {"full": {"weight": 1.0}, "coarse": {"weight": -1.0}}
    with pytest.raises(RecipeError, match="weights of linear sum to 0"):
        dict(Merger(KernelSources(torch.bfloat16)).materialize(plan_of(Setting("linear", {}, weights))))


def printed_by(code: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@compiled
def test_compiled_kernels_load_16_bytes_at_once_and_contract_nothing():
    """For compute capability 9.0, which takes no device; three sources and the base, 2,048 entries each."""
    code = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from evomerge.merge import _triton, device_tables as tables
types = dict(tensor_of="*i32", first_of="*i32", words="*i64", numbers="*fp32", flags="*i32")
for mode, kind in ((tables.AVERAGE, tables.WHOLE), (tables.SUM, tables.HASHED), (tables.ELECT, tables.CUT)):
    values = dict(TERMS=3, KINDS=(kind,) * 3, RAWS=(True,) * 3, MODE=mode)
    values |= dict(DTYPE=_triton.tl.bfloat16, BLOCK=2048)
    constants = {(5 + i,): value for i, value in enumerate(values.values())}
    source = ASTSource(_triton.merge, types | dict.fromkeys(values, "constexpr"), constants)
    options = dict(enable_fp_fusion=False, num_warps=4)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    for word in ("ld.global.v4.b32", "st.global.v4.b32", "fma.rn.f32", "mul.f32", "add.f32"):
        print(len(re.findall(re.escape(word) + r"[ \t]", ptx)), end=" ")
    print()
"""
    per_tensor = 2048 * 2 // (128 * 16)  # 128 threads, 16 bytes each
    for mode, line in zip(("average", "sum", "elect"), printed_by(code), strict=True):
        loads, stores, fused, *inexact = map(int, line.split())
        assert loads == 4 * per_tensor  # election reads its terms once, too
        assert stores == per_tensor
        assert inexact == [0, 0]  # PTX lets these be contracted, those with `.rn` not
        assert bool(fused) == (mode == "average")  # asked for there


@compiled
@pytest.mark.skipif(
    [*map(int, TRITON.split(".")[:2])] < [3, 9] if TRITON else False,
    reason="before Triton 3.9 the interpreter rounds a fused multiply-add twice",
)
def test_the_kernels_in_the_interpreter():
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
