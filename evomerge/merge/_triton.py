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
_SUM, _NORMALIZED = tl.constexpr(tables.SUM), tl.constexpr(tables.ELECT_NORMALIZED)
_AVERAGE = tl.constexpr(tables.AVERAGE)

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _at(address, offsets, DTYPE: tl.constexpr):
    """Places of entries of a tensor at an address that is a multiple of 16 bytes."""
    return tl.max_contiguous(tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + offsets, 16), 16)


@triton.jit
def _load(address, offsets, n, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Entries of a tensor; `FULL` says that all are inside: a mask would split the loads."""
    if FULL:
        x = tl.load(_at(address, offsets, DTYPE))
    else:
        x = tl.load(_at(address, offsets, DTYPE), mask=offsets < n, other=0)
    return x


@triton.jit
def _bfloat16(x):
    """To the nearest and ties to even; on integers, as devices and the interpreter convert differently."""
    word = x.to(tl.int32, bitcast=True)
    word = word + 0x7FFF + ((word >> 16) & 1)
    return (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _delta(words, base, offsets, n, RAW: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Entries of one task vector in float32; `words` points to its term."""
    if RAW:
        x = _load(tl.load(words), offsets, n, DTYPE, FULL).to(tl.float32) - base
    else:
        x = _load(tl.load(words), offsets, n, tl.float32, FULL)
    return x


@triton.jit
def _hash(words, offsets):
    """The hash of `evomerge.merge.mask`, int32 with wrap-around."""
    x = offsets.to(tl.int32) + tl.load(words + 3).to(tl.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x ^ tl.load(words + 4).to(tl.int32)
    return (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261  # 0x846CA68B


@triton.jit
def _kept(x, words, numbers, offsets, n, KIND: tl.constexpr, FULL: tl.constexpr):
    """Zero what is not kept of `x`; the pointers are to its term."""
    if KIND == _CUT:
        outer = tl.where(offsets < tl.load(words + 6), tl.load(numbers + 2), tl.load(numbers + 3))
        inner = tl.where(offsets < tl.load(words + 7), tl.load(numbers + 4), tl.load(numbers + 5))
        x = tl.where(tl.abs(x) <= outer, 0.0, x)
        x = tl.where(tl.abs(x) > inner, 0.0, x)
    if KIND == _HASHED:
        x = x * (_hash(words, offsets).to(tl.int64) < tl.load(words + 5)).to(tl.float32)
    if KIND >= _RANKED:
        if KIND == _RANKED_WIDE:
            rank = _load(tl.load(words + 1), offsets, n, tl.int32, FULL)
        else:
            rank = _load(tl.load(words + 1), offsets, n, tl.int16, FULL)
        limit = tl.load(tl.load(words + 2).to(tl.pointer_type(tl.int32)) + rank)
        x = x * (_hash(words, offsets) < limit).to(tl.float32)
    return x


@triton.jit
def _term(
    words, numbers, base, offsets, n,
    k: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """factor * kept(delta) of term k; the pointers are to the tensor's rows."""
    words += _W + k * _TW
    numbers += _N + k * _TN
    x = _delta(words, base, offsets, n, RAWS[k], DTYPE, FULL)
    return _kept(x, words, numbers, offsets, n, KINDS[k], FULL) * tl.load(numbers)


@triton.jit
def _average(
    words, numbers, base, offsets, n,
    TERMS: tl.constexpr, RAWS: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """sum_i factor_i theta_i / divisor."""
    total = tl.zeros_like(base)
    for k in tl.static_range(TERMS):
        theta = base + _delta(words + _W + k * _TW, base, offsets, n, RAWS[k], DTYPE, FULL)
        total = tl.fma(theta, tl.zeros_like(base) + tl.load(numbers + _N + k * _TN), total)
    return tl.div_rn(total, tl.zeros_like(base) + tl.load(numbers))


@triton.jit
def _sum(
    words, numbers, base, offsets, n,
    TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The sum of the terms / divisor."""
    mix = _term(words, numbers, base, offsets, n, 0, KINDS, RAWS, DTYPE, FULL)
    for k in tl.static_range(1, TERMS):
        mix += _term(words, numbers, base, offsets, n, k, KINDS, RAWS, DTYPE, FULL)
    return tl.div_rn(mix, tl.zeros_like(base) + tl.load(numbers))


@triton.jit
def _elected(
    words, numbers, base, offsets, n, NORMALIZED: tl.constexpr,
    TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The sum of the entries that have its sign, divided by the sum of their weights if asked."""
    total = tl.zeros_like(base)
    for k in tl.static_range(TERMS):
        total += _term(words, numbers, base, offsets, n, k, KINDS, RAWS, DTYPE, FULL)
    sign = tl.where(total.to(tl.int32, bitcast=True) < 0, -1.0, 1.0)
    mix, divisor = tl.zeros_like(base), tl.zeros_like(base)
    for k in tl.static_range(TERMS):  # the compiler sees that it has these terms: nothing is loaded twice
        agreed = _term(words, numbers, base, offsets, n, k, KINDS, RAWS, DTYPE, FULL) * sign
        agreed = tl.where(agreed < 0.0, 0.0, agreed)
        mix += agreed
        divisor += tl.where(agreed > 0.0, tl.load(numbers + _N + k * _TN + 1), 0.0)
    mix *= sign
    if NORMALIZED:
        least = tl.load(numbers + 2)
        positive = tl.where(divisor < least, least, divisor)
        divisor = tl.where(least > 0.0, positive, tl.where(divisor == 0.0, 1.0, divisor))
        mix = tl.div_rn(mix, divisor)
    return mix


@triton.jit
def _merge(
    words, numbers, flag, offsets, n, TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr,
    MODE: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    base = _load(tl.load(words), offsets, n, DTYPE, FULL).to(tl.float32)
    if MODE == _AVERAGE:
        result = _average(words, numbers, base, offsets, n, TERMS, RAWS, DTYPE, FULL)
    else:
        if MODE == _SUM:
            mix = _sum(words, numbers, base, offsets, n, TERMS, KINDS, RAWS, DTYPE, FULL)
        else:
            mix = _elected(
                words, numbers, base, offsets, n, MODE == _NORMALIZED, TERMS, KINDS, RAWS, DTYPE, FULL
            )
        result = base + mix * tl.load(numbers + 1)
    if DTYPE == tl.bfloat16:  # noqa: SIM108, SIM300
        rounded = _bfloat16(result)
    else:
        rounded = result.to(DTYPE)
    finite = (tl.abs(result) < float("inf")) & (tl.abs(rounded.to(tl.float32)) < float("inf"))
    places = _at(tl.load(words + 1), offsets, DTYPE)
    if FULL:
        tl.store(places, rounded)
    else:
        tl.store(places, rounded, mask=offsets < n)
        finite = finite | (offsets >= n)
    if tl.min(finite.to(tl.int32), 0) == 0:
        tl.store(flag, 1)


@triton.jit
def merge(
    tensor_of, first_of, words, numbers, flags, TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr,
    MODE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge one block; set the tensor's flag where a result is not finite."""
    tensor = tl.load(tensor_of + tl.program_id(0))
    first = (tl.program_id(0) - tl.load(first_of + tensor)).to(tl.int64) * BLOCK
    words += tensor * (_W + TERMS * _TW)
    numbers += tensor * (_N + TERMS * _TN)
    offsets, n = first + tl.arange(0, BLOCK), tl.load(words + 2)
    if first + BLOCK <= n:
        _merge(words, numbers, flags + tensor, offsets, n, TERMS, KINDS, RAWS, MODE, DTYPE, True)
    else:
        _merge(words, numbers, flags + tensor, offsets, n, TERMS, KINDS, RAWS, MODE, DTYPE, False)


@triton.jit
def _norms(
    words, numbers, sums, offsets, n,
    TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, DTYPE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    base = _load(tl.load(words), offsets, n, DTYPE, FULL).to(tl.float32)
    for k in tl.static_range(TERMS):
        term, limits = words + _W + k * _TW, numbers + _N + k * _TN
        x = _delta(term, base, offsets, n, RAWS[k], DTYPE, FULL)
        tl.store(sums + 2 * k, tl.sum(tl.abs(x).to(tl.float64), 0))
        x = _kept(x, term, limits, offsets, n, KINDS[k], FULL)
        tl.store(sums + 2 * k + 1, tl.sum(tl.abs(x).to(tl.float64), 0))


@triton.jit
def norms(
    tensor_of, first_of, words, numbers, sums, TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums` (blocks, TERMS, 2): of a term's magnitudes in one block, and of what is kept of them."""
    tensor = tl.load(tensor_of + tl.program_id(0))
    first = (tl.program_id(0) - tl.load(first_of + tensor)).to(tl.int64) * BLOCK
    words += tensor * (_W + TERMS * _TW)
    numbers += tensor * (_N + TERMS * _TN)
    sums += tl.program_id(0).to(tl.int64) * (2 * TERMS)
    offsets, n = first + tl.arange(0, BLOCK), tl.load(words + 2)
    if first + BLOCK <= n:
        _norms(words, numbers, sums, offsets, n, TERMS, KINDS, RAWS, DTYPE, True)
    else:
        _norms(words, numbers, sums, offsets, n, TERMS, KINDS, RAWS, DTYPE, False)


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
