"""Random masks against what is asked of them: fair, nested, independent of everything but seed and index."""

from __future__ import annotations

import pytest
import torch

import evomerge.merge.packed  # noqa: F401  before a test puts something else in the place of `Drawn`
from evomerge.merge.mask import Mask, keep_mask, keep_mask_by_class, keys_of
from evomerge.recipe import Setting

N = 1 << 16


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_the_kept_fraction_is_the_density(density):
    kept = torch.stack([keep_mask(seed, density, N) for seed in range(64)]).double().mean().item()
    assert abs(kept - density) < 5 * (density * (1 - density) / (64 * N)) ** 0.5  # 5 sigma


def test_every_position_is_kept_equally_often():
    """Chi-squared of the counts per position over seeds; its mean is n, its standard deviation sqrt(2 n)."""
    seeds, n = 2000, 1000
    counts = sum(keep_mask(seed, 0.5, n).double() for seed in range(seeds))
    chi2 = ((counts - seeds / 2) ** 2 / (seeds / 4)).sum().item()
    assert abs(chi2 - n) < 5 * (2 * n) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 576, 1024, 1536, 4096, 1 << 15])
def test_neighbours_and_rows_are_uncorrelated(lag):
    signs = torch.stack([keep_mask(seed, 0.5, N + lag) for seed in range(16)]).double() * 2 - 1
    correlation = (signs[:, lag:] * signs[:, :-lag]).mean().item()
    assert abs(correlation) < 5 / (16 * N) ** 0.5


def test_two_seeds_are_uncorrelated_even_where_their_hash_inputs_coincide():
    """The first key shifts the index; where lags undo the shift only the second key tells seeds apart."""
    for seed in range(4):
        shift = (keys_of(seed)[0] - keys_of(seed + 1)[0]) % (1 << 32)
        a = keep_mask(seed, 0.5, N).double() * 2 - 1
        for start in (0, shift):
            b = keep_mask(seed + 1, 0.5, N, start=start).double() * 2 - 1
            assert abs((a * b).mean().item()) < 5 / N**0.5


def test_masks_are_nested_in_density():
    few, many = (keep_mask(3, density, N) for density in (0.3, 0.6))
    assert torch.equal(few & many, few)


@pytest.mark.parametrize("block", [1, 100, 4096, N])
def test_the_block_size_cannot_change_a_mask(block):
    n = 1000 if block == 1 else 5000
    assert torch.equal(keep_mask(5, 0.4, n, block=block), keep_mask(5, 0.4, n))


@pytest.mark.parametrize("start", [1, 1000, 32_000, 40_001])
def test_a_shard_has_its_part_of_the_whole_mask(start):
    assert torch.equal(keep_mask(5, 0.4, N - start, start=start), keep_mask(5, 0.4, N)[start:])


def test_the_global_generator_has_no_part_in_it():
    torch.manual_seed(0)
    first = keep_mask(7, 0.5, 1000)
    state = torch.get_rng_state()
    torch.rand(123)
    assert torch.equal(first, keep_mask(7, 0.5, 1000))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_density_one_keeps_everything():
    assert keep_mask(1, 1.0, 1000).all()


def test_each_class_has_the_mask_of_its_own_density():
    densities = [0.1, 0.35, 0.9]
    classes = torch.arange(5000, dtype=torch.int16) * 7 % 3
    mask = keep_mask_by_class(5, torch.tensor(densities, dtype=torch.float64), classes)
    for number, density in enumerate(densities):
        assert torch.equal(mask[classes == number], keep_mask(5, density, 5000)[classes == number])


@pytest.mark.parametrize("start", [0, 1, 1000, 4097])
@pytest.mark.parametrize("block", [7, 1024])
def test_classes_do_not_tie_a_mask_to_blocks_or_shards(start, block):
    densities = torch.tensor([0.2, 0.7], dtype=torch.float64)
    classes = torch.arange(5000) % 2
    whole = keep_mask_by_class(5, densities, classes)
    assert torch.equal(
        keep_mask_by_class(5, densities, classes[start:], start=start, block=block), whole[start:]
    )


@pytest.mark.goldens("dare_given_mask")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_dare_agrees_with_the_definition_for_a_given_mask(case, dtype, tolerance, merge, monkeypatch):
    """By default kept entries are rescaled by the L1 norm (mergekit); the paper's 1/density is a `lambda`."""
    base, model, mask = (torch.tensor(case["inputs"][key], dtype=dtype) for key in ("base", "model", "mask"))
    monkeypatch.setattr("evomerge.merge.mask.Drawn", lambda seed, density: Mask(mask.reshape(-1).bool()))
    paper = "paper" in case["params"]["rescale"]
    shared = {"rescale": False, "lambda": 1 / case["params"]["density"]} if paper else {}
    setting = Setting("dare_linear", shared, {"m": {"weight": case["params"]["weight"], "density": 0.5}})
    merged = merge(setting, base, [model - base], seeds=(0,))
    expected = torch.tensor(case["expected"], dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)


def test_dare_is_unbiased(merge):
    """Of equal magnitudes the L1 rescaling keeps the sum, so the mean over seeds is the task vector."""
    delta = torch.ones(64)
    setting = Setting("dare_linear", {}, {"m": {"weight": 1.0, "density": 0.25}})
    results = [merge(setting, torch.zeros(64), [delta], seeds=(seed,)) for seed in range(2000)]
    # an entry is 64/kept with probability kept/64, kept ~ 16 +- 3.5: its sd is below 2
    torch.testing.assert_close(torch.stack(results).mean(0), delta, rtol=0, atol=5 * 2 / 2000**0.5)
