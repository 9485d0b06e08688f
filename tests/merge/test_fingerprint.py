"""The sum of bit patterns by which an engine's weights are compared with the merged ones."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from evomerge.merge import compiled
from evomerge.merge.fingerprint import SAMPLES, bit_sum, checksum

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_struct(tensor: torch.Tensor) -> int:
    """The definition, one element at a time."""
    values = tensor.float().flatten().tolist()
    total = sum(struct.unpack("<i", struct.pack("<f", value))[0] for value in values)
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_sum_of_the_float32_bit_patterns(dtype: torch.dtype):
    tensor = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert bit_sum(tensor) == by_struct(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_have_together_the_sum_of_the_whole(dtype: torch.dtype):
    tensor = torch.randn(64, 2100, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows, columns = tensor[:13], (tensor[13:, :700], tensor[13:, 700:])
    assert bit_sum(tensor) == bit_sum(rows) + sum(map(bit_sum, columns))


def test_padding_with_zeros_changes_nothing():
    tensor = torch.randn(70_000, generator=torch.Generator().manual_seed(2))
    assert bit_sum(torch.cat([tensor, torch.zeros(70_000)])) == bit_sum(tensor)


def test_widening_to_float32_changes_nothing():
    tensor = torch.randn(999, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert bit_sum(tensor.float()) == bit_sum(tensor)


def test_one_bit_changes_it():
    tensor = torch.ones(100_000)
    changed = tensor.clone()
    changed.view(torch.int32)[77_777] ^= 1
    assert bit_sum(changed) != bit_sum(tensor)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(compiled, "available", lambda: False)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("dtype", DTYPES)
def test_either_way_gives_the_sum_of_the_bit_patterns(dtype: torch.dtype):
    tensor = torch.randn(641, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert bit_sum(tensor) == by_struct(tensor)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("n", [0, 7, SAMPLES, 3 * SAMPLES + 5])
def test_the_checksum_weighs_every_word_that_it_reads_by_its_place(n: int):
    words = torch.randint(-(2**15), 2**15, (n,), generator=torch.Generator().manual_seed(n))
    stride = max(1, math.ceil(n / SAMPLES))
    expected = sum(word * (i % 8191 + 1) for i, word in enumerate(words.tolist()[::stride]))
    assert checksum(words.to(torch.int16).view(torch.bfloat16)) == expected


@pytest.mark.usefixtures("_both_ways")
def test_no_rows_of_a_tensor_sum_to_nothing():
    """What a worker does not hold of a shared weight."""
    assert bit_sum(torch.ones(3, 4)[:0]) == 0


@pytest.mark.usefixtures("_both_ways")
def test_the_checksum_reads_a_tensor_in_its_logical_order():
    tensor = torch.randn(40, 30, generator=torch.Generator().manual_seed(5))
    assert checksum(tensor.T) == checksum(tensor.T.contiguous()) != checksum(tensor)
