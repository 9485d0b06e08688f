"""The accelerator's kernels give the bits of the CPU, run by Triton's interpreter.

The interpreter is chosen when a process first imports Triton, so these tests run in a process of their own,
started by the last one; alone: `TRITON_INTERPRET=1 python -m pytest tests/merge/test_device_kernels.py`.
`tests/gpu/test_kernels.py` has the same properties for a device.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from evomerge.errors import RecipeError
from evomerge.merge import device_pass, magnitude
from evomerge.merge.merger import Merger
from evomerge.merge.methods._gta import Term
from evomerge.merge.norms import l1
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
def test_rescaled_results_are_those_of_the_cpu(name):
    rng, sources = random.Random(name), KernelSources(torch.float32)
    for seed in range(2):
        plan = plan_of(random_setting(name, rng, rescale=True), seed)
        assert_same(by_kernel(sources, plan), by_cpu(sources, plan), plan)


@interpreted
def test_norms_are_those_of_the_cpu_to_the_last_bit_of_float64(monkeypatch):
    """Rounded to float32, factors would hide sums in another order, and so would magnitudes of like size."""
    buffers, make = [], device_pass.DevicePass._by_block

    def kept(*arguments):
        buffers.append(make(*arguments))
        return buffers[-1]

    monkeypatch.setattr(device_pass.DevicePass, "_by_block", kept)
    sources = KernelSources(torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, base in sources.base.items():
        sources.own["full", name] *= torch.exp2(12 * torch.randn(base.shape, generator=generator))
    models = {model: {"weight": 1.0, "density": 0.5} for model in ("full", "coarse")}
    by_kernel(sources, plan_of(Setting("dare_linear", {}, models)))
    ((work, sums),) = buffers
    for number, name in enumerate(NAMES):
        blocks = sums[work.first_of[number] : work.first_of[number + 1]]
        for k, model in enumerate(models):
            (exact,) = l1([Term(sources.delta(model, name).reshape(-1), None, 1.0, 1.0)])
            assert math.fsum(blocks[:, k, 0].tolist()) == exact.norm


@interpreted
@pytest.mark.parametrize("worth", [0, 1, 1 << 40])
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_thresholds_looked_up_and_found_on_the_device_give_the_same_bits(name, worth, monkeypatch):
    """Of few blocks at once, so that the places of cuts lie in blocks of several steps."""
    rng, sources = random.Random(f"{name} {worth}"), KernelSources(torch.bfloat16)
    expected = [by_cpu(sources, plan_of(random_setting(name, rng))) for _ in range(4)]
    rng = random.Random(f"{name} {worth}")
    if worth:
        monkeypatch.setattr(magnitude, "WORTH", worth)  # 1: all are remembered, 2**40: none
    monkeypatch.setattr(device_pass, "STEP", 1)
    for one in expected:
        plan = plan_of(random_setting(name, rng))
        assert_same(by_kernel(sources, plan), one, plan)


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


COMPILER = r"""
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from evomerge.merge import _triton, device_tables as tables
TYPES = dict.fromkeys(["tensor_of", "first_of", "flags", "counts"], "*i32")
TYPES |= dict(words="*i64", numbers="*fp32")
TYPES |= dict.fromkeys(["sums", "weights", "smallest"], "*fp64")
SHAPE = dict(DTYPE=_triton.tl.bfloat16, BLOCK=2048, STEP=1024, HALVINGS=11)

def print_counts(kernel, patterns, **values):
    types = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
    values |= SHAPE
    constants = {(i,): values[name] for i, name in enumerate(types) if name in values}
    options = dict(enable_fp_fusion=False, num_warps=4)
    source = ASTSource(kernel, types, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(*(len(re.findall(pattern + r"[ \t]", ptx)) for pattern in patterns))
"""


@compiled
def test_compiled_kernels_load_16_bytes_at_once_and_contract_nothing():
    """For compute capability 9.0, which takes no device; three sources and the base, 2,048 entries each."""
    code = """
words = r"ld[.]global[.]v4[.]b32", r"st[.]global[.]v4[.]b32", r"fma[.]rn[.]f32", r"mul[.]f32", r"add[.]f32"
for mode, kind in ((tables.AVERAGE, tables.WHOLE), (tables.SUM, tables.HASHED), (tables.ELECT, tables.CUT)):
    print_counts(_triton.merge, words, TERMS=3, KINDS=(kind,) * 3, RAWS=(True,) * 3, MODE=mode)
"""
    per_tensor = 2048 * 2 // (128 * 16)  # 128 threads, 16 bytes each
    for mode, line in zip(("average", "sum", "elect"), printed_by(COMPILER + code), strict=True):
        loads, stores, fused, *inexact = map(int, line.split())
        assert loads == 4 * per_tensor  # election reads its terms once, too
        assert stores == per_tensor
        assert inexact == [0, 0]  # PTX lets these be contracted, those with `.rn` not
        assert bool(fused) == (mode == "average")  # asked for there


@compiled
def test_the_kernels_of_places_and_norms_compile_and_contract_nothing():
    code = """
for kernel in (_triton.ties, _triton.places, _triton.norms, _triton.rescale):
    words = r"(?:fma[.]rn|mul|add)[.]f(?:32|64)", r"ld[.]global[.]\\S+"
    print_counts(kernel, words, TERMS=2, KINDS=(tables.CUT,) * 2, RAWS=(True, False))
"""
    for line in printed_by(COMPILER + code):
        inexact, loads = map(int, line.split())
        assert inexact == 0
        assert loads


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
