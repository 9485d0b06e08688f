"""The compiled loops give the bits of the torch kernels."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from evomerge.merge import compiled, fused, norms, workers
from evomerge.merge.magnitude import Cut
from evomerge.merge.mask import Drawn, Mask
from evomerge.merge.methods import METHODS, SPECS
from evomerge.merge.methods._gta import GtaKernel, Term
from evomerge.merge.methods._method import CHUNK, TensorInputs
from evomerge.recipe import Setting
from evomerge.sources.streamed import RawDelta

pytest.importorskip("numba", reason="the loops are compiled by numba")

FAMILY = [name for name, spec in SPECS.items() if {"weight", "lambda"} <= {*spec.per_model, *spec.shared}]
FUSED = [name for name in ("linear", *FAMILY) if METHODS[name].compiled]
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


def as_raw(inputs: TensorInputs) -> TensorInputs:
    """The same with sources of the base's dtype in place of the task vectors; the second stays float32."""
    deltas = [
        delta
        if delta is None or number == 1
        else RawDelta((inputs.base + delta).to(inputs.base), inputs.base)
        for number, delta in enumerate(inputs.deltas)
    ]
    return replace(inputs, deltas=deltas)


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


@pytest.mark.parametrize("name", FUSED)
def test_sources_as_stored_give_the_bits_of_their_task_vectors(name):
    rng = random.Random(name)
    merged = 0
    for seed in range(12):
        raw = as_raw(inputs_of(random_setting(name, rng), torch.bfloat16, seed))
        whole = replace(raw, deltas=[None if delta is None else delta[:] for delta in raw.deltas])
        found = by_numba(raw)
        if found is not None:
            merged += 1
            expected = by_torch(whole)
            assert same_bits(found[0], expected), raw.setting
            assert same_bits(by_torch(raw), expected), raw.setting
    assert merged > 8


@pytest.mark.parametrize("count", [3, fused.ONE_LOOP + 1])
@pytest.mark.parametrize("name", FUSED)
def test_any_number_of_sources_as_stored_gives_the_bits_of_torch(name, count):
    usual = {"weight": 0.4, "density": 0.6, "gamma": 0.05, "epsilon": 0.2}
    values = {key: usual[key] for key in SPECS[name].per_model}
    setting = Setting(name, {}, {f"m{number}": values for number in range(count)})
    inputs = inputs_of(setting, torch.bfloat16, 5)
    generator = torch.Generator().manual_seed(6)
    sources = [inputs.base + torch.randn(N, generator=generator).mul_(0.02) for _ in range(count)]
    deltas = [RawDelta(source.bfloat16(), inputs.base) for source in sources]
    inputs = replace(inputs, deltas=deltas, seeds=tuple(range(count)) if inputs.seeds else ())
    assert same_bits(by_numba(inputs)[0], by_torch(inputs))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_a_bit(threads, monkeypatch):
    setting = Setting("ties", {}, {m: {"weight": 0.5, "density": 0.3} for m in "abc"})
    inputs = inputs_of(setting, torch.bfloat16, 1)
    monkeypatch.setattr(workers, "SHARED", 1)
    torch.set_num_threads(threads)
    assert same_bits(by_numba(inputs)[0], by_torch(inputs))


@pytest.mark.parametrize("density", [1.0, 0.999, 0.3, 1e-9])
@pytest.mark.parametrize("classes", [None, torch.int16, torch.int32], ids=str)
def test_masks_drawn_in_the_loops_are_those_of_torch(density, classes):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(N, generator=generator)
    drawn = Drawn(2**32 - 1, density)
    if classes is not None:
        chances = torch.tensor([density / 2, density / 3], dtype=torch.float64)
        drawn = Drawn(7, chances, torch.randint(0, 2, (N,), generator=generator).to(classes))
    base = torch.zeros(N)
    kernel = GtaKernel((Term(delta, drawn, 0.7, 1.0),), False, False, 1.0, 1.0, torch.empty(2, N))
    merged = torch.empty_like(base)
    assert fused.fits(kernel, base)
    assert fused.merge(kernel, base, merged)
    kernel(0, N, base)
    assert same_bits(merged, base)


def some_terms() -> dict[str, Term]:
    inputs = inputs_of(Setting("ties", {}, {"a": {"weight": 1.0}}), torch.bfloat16, 3)
    source = (inputs.base.float() + inputs.deltas[0]).bfloat16()
    raw, delta = RawDelta(source, inputs.base), inputs.deltas[0]
    return {
        "float32": Term(delta, None, 1.0, 1.0),
        "cut": Term(delta, Cut(0.02, 40_000, 0.0199), 1.0, 1.0),
        "drawn": Term(raw, Drawn(1, 0.4), 1.0, 1.0),
        "raw": Term(raw, None, 1.0, 1.0),
        "short": Term(delta[:5], None, 1.0, 1.0),
    }


def test_norms_of_several_terms_are_those_of_each():
    together = [term for name, term in some_terms().items() if name != "short"]
    assert [found.norm for found in norms.l1(together)] == [norms.l1([term])[0].norm for term in together]


def test_a_mask_is_drawn_once_unless_it_is_too_large_to_keep(monkeypatch):
    term = some_terms()["drawn"]
    (kept,) = norms.l1([term])
    assert isinstance(kept.kept, Mask)
    found, wanted = torch.empty(N), torch.empty(N)
    replace(term, kept=kept.kept).write(0, N, found)
    term.write(0, N, wanted)
    assert same_bits(found, wanted)
    monkeypatch.setattr(norms, "MASK_BYTES", N - 1)
    assert norms.l1([term]) == [norms.Measured(kept.norm, term.kept)]


@pytest.mark.parametrize("name", some_terms())
@pytest.mark.parametrize("threads", [1, 3])
def test_norms_have_the_same_bits_in_loops_and_in_torch(name, threads, monkeypatch):
    term = some_terms()[name]
    monkeypatch.setattr(workers, "SHARED", 1)
    torch.set_num_threads(threads)
    by_loops = norms.l1([term])[0].norm
    monkeypatch.setattr(norms, "readable", lambda delta: False)
    assert norms.l1([term])[0].norm == by_loops
    monkeypatch.setattr(norms, "BLOCKS", 2)
    assert norms.l1([term])[0].norm == by_loops
    out = torch.empty(term.delta.numel())
    term.write(0, len(out), out)
    # at most 2**-24 for each of the two halvings in float32
    assert by_loops == pytest.approx(math.fsum(out.abs().tolist()), rel=2 * 2**-24)


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
    monkeypatch.setattr(compiled, "available", lambda: False)
    setting = Setting("task_arithmetic", {}, {"a": {"weight": 1.0}})
    assert by_numba(inputs_of(setting, torch.bfloat16, 0)) is None
