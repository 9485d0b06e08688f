"""The kernels of `evomerge.merge.device_pass`; importing this needs Triton. Has not run on a GPU yet:
checked in Triton's interpreter, and by compiling for compute capability 9.0.

One launch merges many tensors. A program merges `BLOCK` entries of one of them: `tensor_of` says of which,
`first_of` which program begins it. What a tensor needs stands in one row of two tables: `words` (int64:
addresses, sizes, keys) and `numbers` (float32: factors, limits); `device_tables` writes them.

The operations, their order and their rounding are those of the torch kernels on a CPU: products are not
contracted with sums (launch with `enable_fp_fusion=False`), divisions are rounded correctly, and the fused
multiply-add of `linear` is asked for. So results are the same, bit by bit.

Imports: torch, triton, `evomerge.merge.device_tables`.
"""

import torch
import triton
import triton.language as tl

from evomerge.merge import device_tables as tables

# a kernel sees only globals of this type
_W, _TW = tl.constexpr(tables.WORDS), tl.constexpr(tables.TERM_WORDS)
_N, _TN = tl.constexpr(tables.NUMBERS), tl.constexpr(tables.TERM_NUMBERS)
_CUT, _HASHED = tl.constexpr(tables.CUT), tl.constexpr(tables.HASHED)
_RANKED, _RANKED_WIDE = tl.constexpr(tables.RANKED), tl.constexpr(tables.RANKED_WIDE)
_RAW, _CODES = tl.constexpr(tables.RAW), tl.constexpr(tables.CODES)
_SUM, _NORMALIZED = tl.constexpr(tables.SUM), tl.constexpr(tables.ELECT_NORMALIZED)
_AVERAGE = tl.constexpr(tables.AVERAGE)

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _load(address, offsets, inside, DTYPE: tl.constexpr):
    """Entries of a tensor at an address that is a multiple of 16 bytes."""
    places = address.to(tl.pointer_type(DTYPE)) + offsets
    return tl.load(tl.max_contiguous(tl.multiple_of(places, 16), 16), mask=inside, other=0)


@triton.jit
def _bfloat16(x):
    """To the nearest and ties to even; on integers, as devices and the interpreter convert differently."""
    word = x.to(tl.int32, bitcast=True)
    word = word + 0x7FFF + ((word >> 16) & 1)
    return (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _delta(words, base, offsets, inside, DTYPE: tl.constexpr, KIND: tl.constexpr):
    """Entries of one task vector in float32; `words` points to its term."""
    if KIND >= _RAW:
        x = _load(tl.load(words), offsets, inside, DTYPE).to(tl.float32) - base
    else:
        x = _load(tl.load(words), offsets, inside, tl.float32)
    return x


@triton.jit
def _hash(words, offsets):
    """The hash of `evomerge.merge.mask`, int32 with wrap-around."""
    x = offsets.to(tl.int32) + tl.load(words + 3).to(tl.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x ^ tl.load(words + 4).to(tl.int32)
    return (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261  # 0x846CA68B


@triton.jit
def _kept(x, words, numbers, offsets, inside, KIND: tl.constexpr):
    """Zero what is not kept of `x`; the pointers are to its term."""
    if KIND % _RAW == _CUT:
        outer = tl.where(offsets < tl.load(words + 6), tl.load(numbers + 2), tl.load(numbers + 3))
        inner = tl.where(offsets < tl.load(words + 7), tl.load(numbers + 4), tl.load(numbers + 5))
        x = tl.where(tl.abs(x) <= outer, 0.0, x)
        x = tl.where(tl.abs(x) > inner, 0.0, x)
    if KIND % _RAW == _HASHED:
        x = x * (_hash(words, offsets).to(tl.int64) < tl.load(words + 5)).to(tl.float32)
    if KIND % _RAW >= _RANKED:
        if KIND % _RAW == _RANKED_WIDE:
            rank = _load(tl.load(words + 1), offsets, inside, tl.int32)
        else:
            rank = _load(tl.load(words + 1), offsets, inside, tl.int16)
        limit = tl.load(tl.load(words + 2).to(tl.pointer_type(tl.int32)) + rank, mask=inside, other=0)
        x = x * (_hash(words, offsets) < limit).to(tl.float32)
    return x


@triton.jit
def _term(words, numbers, base, offsets, inside, k: tl.constexpr, KINDS: tl.constexpr, DTYPE: tl.constexpr):
    """factor * kept(delta) of term k; the pointers are to the tensor's rows."""
    KIND: tl.constexpr = KINDS // _CODES**k % _CODES
    words += _W + k * _TW
    numbers += _N + k * _TN
    x = _delta(words, base, offsets, inside, DTYPE, KIND)
    return _kept(x, words, numbers, offsets, inside, KIND) * tl.load(numbers)


@triton.jit
def merge(
    tensor_of, first_of, words, numbers, flags,
    TERMS: tl.constexpr, KINDS: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge one block; set the tensor's flag where a result is not finite."""
    tensor = tl.load(tensor_of + tl.program_id(0))
    block = tl.program_id(0) - tl.load(first_of + tensor)
    words += tensor * (_W + TERMS * _TW)
    numbers += tensor * (_N + TERMS * _TN)
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.load(words + 2)
    base = _load(tl.load(words), offsets, inside, DTYPE).to(tl.float32)
    mix = tl.zeros((BLOCK,), tl.float32)
    if MODE == _AVERAGE:
        for k in tl.static_range(TERMS):
            KIND: tl.constexpr = KINDS // _CODES**k % _CODES
            theta = base + _delta(words + _W + k * _TW, base, offsets, inside, DTYPE, KIND)
            factor = tl.load(numbers + _N + k * _TN) + tl.zeros((BLOCK,), tl.float32)
            mix = tl.fma(theta, factor, mix)
        result = tl.div_rn(mix, tl.load(numbers) + tl.zeros((BLOCK,), tl.float32))
    else:
        if MODE != _SUM:
            total = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(TERMS):
                total += _term(words, numbers, base, offsets, inside, k, KINDS, DTYPE)
            sign = tl.where(total.to(tl.int32, bitcast=True) < 0, -1.0, 1.0)
            divisor = tl.zeros((BLOCK,), tl.float32)
            for k in tl.static_range(TERMS):  # the compiler finds these terms computed already
                agreed = _term(words, numbers, base, offsets, inside, k, KINDS, DTYPE) * sign
                agreed = tl.where(agreed < 0.0, 0.0, agreed)
                mix += agreed
                divisor += tl.where(agreed > 0.0, tl.load(numbers + _N + k * _TN + 1), 0.0)
            mix *= sign
            if MODE == _NORMALIZED:
                least = tl.load(numbers + 2)
                positive = tl.where(divisor < least, least, divisor)
                divisor = tl.where(least > 0.0, positive, tl.where(divisor == 0.0, 1.0, divisor))
                mix = tl.div_rn(mix, divisor)
        else:
            mix = _term(words, numbers, base, offsets, inside, 0, KINDS, DTYPE)
            for k in tl.static_range(1, TERMS):
                mix += _term(words, numbers, base, offsets, inside, k, KINDS, DTYPE)
            mix = tl.div_rn(mix, tl.load(numbers) + tl.zeros((BLOCK,), tl.float32))
        result = base + mix * tl.load(numbers + 1)
    rounded = result
    if DTYPE == tl.float16:  # noqa: SIM300
        rounded = result.to(tl.float16)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        rounded = _bfloat16(result)
    places = tl.load(words + 1).to(tl.pointer_type(DTYPE)) + offsets
    tl.store(tl.max_contiguous(tl.multiple_of(places, 16), 16), rounded, mask=inside)
    finite = (tl.abs(result) < float("inf")) & (tl.abs(rounded.to(tl.float32)) < float("inf"))
    if tl.min((finite | (inside == 0)).to(tl.int32), 0) == 0:
        tl.store(flags + tensor, 1)


@triton.jit
def norms(
    tensor_of, first_of, words, numbers, sums,
    TERMS: tl.constexpr, KINDS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` (blocks, TERMS, 2): of a term's magnitudes in one block, and of what is kept of them."""
    tensor = tl.load(tensor_of + tl.program_id(0))
    block = tl.program_id(0) - tl.load(first_of + tensor)
    words += tensor * (_W + TERMS * _TW)
    numbers += tensor * (_N + TERMS * _TN)
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.load(words + 2)
    base = _load(tl.load(words), offsets, inside, DTYPE).to(tl.float32)
    sums += tl.program_id(0).to(tl.int64) * (2 * TERMS)
    for k in tl.static_range(TERMS):
        KIND: tl.constexpr = KINDS // _CODES**k % _CODES
        term, limits = words + _W + k * _TW, numbers + _N + k * _TN
        x = _delta(term, base, offsets, inside, DTYPE, KIND)
        tl.store(sums + 2 * k, tl.sum(tl.abs(x).to(tl.float64), 0))
        if KIND % _RAW != 0:
            x = _kept(x, term, limits, offsets, inside, KIND)
        tl.store(sums + 2 * k + 1, tl.sum(tl.abs(x).to(tl.float64), 0))


@triton.jit
def rescale(first_of, sums, weights, numbers, smallest, TERMS: tl.constexpr, STEP: tl.constexpr):
    """factor = weight * before / after for one term of one tensor; the sums are added in a fixed order."""
    tensor, k = tl.program_id(0), tl.program_id(1)
    before, after = tl.zeros((STEP,), tl.float64), tl.zeros((STEP,), tl.float64)
    stop = tl.load(first_of + tensor + 1)
    for low in range(tl.load(first_of + tensor), stop, STEP):
        blocks = low + tl.arange(0, STEP)
        places = sums + blocks.to(tl.int64) * (2 * TERMS) + 2 * k
        before += tl.load(places, mask=blocks < stop, other=0.0)
        after += tl.load(places + 1, mask=blocks < stop, other=0.0)
    norm, left, least = tl.sum(before, 0), tl.sum(after, 0), tl.load(smallest)
    weight = tl.load(weights + tensor * TERMS + k)
    by = tl.where(left >= least, left, 1.0)
    factor = tl.where((norm >= least) & (left >= least), weight * (norm / by), weight)
    tl.store(numbers + tensor * (_N + TERMS * _TN) + _N + k * _TN, factor.to(tl.float32))
