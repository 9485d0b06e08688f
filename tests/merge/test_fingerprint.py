"""The sum of bit patterns by which an engine's weights are compared with the merged ones."""

from __future__ import annotations

import struct

import pytest
import torch

from evomerge.merge.fingerprint import bit_sum

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
