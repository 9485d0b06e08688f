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
_OUTER, _INNER = tl.constexpr(tables.CUTS[0]), tl.constexpr(tables.CUTS[1])
_CUT, _HASHED = tl.constexpr(tables.CUT), tl.constexpr(tables.HASHED)
_RANKED, _RANKED_WIDE = tl.constexpr(tables.RANKED), tl.constexpr(tables.RANKED_WIDE)
_SUM, _NORMALIZED = tl.constexpr(tables.SUM), tl.constexpr(tables.ELECT_NORMALIZED)
_AVERAGE = tl.constexpr(tables.AVERAGE)

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _block(tensor_of, first_of, words, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's tensor, the words of that, the program's first entry, and how many the tensor has."""
    tensor = tl.load(tensor_of + tl.program_id(0))
    first = (tl.program_id(0) - tl.load(first_of + tensor)).to(tl.int64) * BLOCK
    words += tensor * (_W + TERMS * _TW)
    return tensor, words, first, tl.load(words + 2)


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
    """The hash of `evomerge.merge.mask`, with the sign bit turned: an order of uint32."""
    x = offsets.to(tl.int32) + tl.load(words + 3).to(tl.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x ^ tl.load(words + 4).to(tl.int32)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261  # 0x846CA68B
    return (x ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _limit(cut, offsets):
    """The limit of each entry by one cut; the pointer is to its words."""
    word = tl.where(offsets < tl.load(cut), tl.load(cut + 1), tl.load(cut + 2))
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _kept(x, words, offsets, n, KIND: tl.constexpr, FULL: tl.constexpr):
    """Zero what is not kept of `x`; the pointer is to its term's words."""
    if KIND == _CUT:
        x = tl.where(tl.abs(x) <= _limit(words + _OUTER, offsets), 0.0, x)
        x = tl.where(tl.abs(x) > _limit(words + _INNER, offsets), 0.0, x)
    if KIND == _HASHED:
        x = x * (_hash(words, offsets).to(tl.int64) < tl.load(words + 5)).to(tl.float32)
    if KIND >= _RANKED:
        if KIND == _RANKED_WIDE:
            rank = _load(tl.load(words + 1), offsets, n, tl.int32, FULL)
        else:
            rank = _load(tl.load(words + 1), offsets, n, tl.int16, FULL)
        limit = tl.load(tl.load(words + 2).to(tl.pointer_type(tl.uint32)) + rank)
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
    return _kept(x, words, offsets, n, KINDS[k], FULL) * tl.load(numbers)


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
    tensor, words, first, n = _block(tensor_of, first_of, words, TERMS, BLOCK)
    numbers += tensor * (_N + TERMS * _TN)
    offsets = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        _merge(words, numbers, flags + tensor, offsets, n, TERMS, KINDS, RAWS, MODE, DTYPE, True)
    else:
        _merge(words, numbers, flags + tensor, offsets, n, TERMS, KINDS, RAWS, MODE, DTYPE, False)


@triton.jit
def _equal(words, cut, base, offsets, n, RAW: tl.constexpr, DTYPE: tl.constexpr):
    """Which entries are equal to the threshold of a cut; the pointers are to its term's words and its own."""
    x = tl.abs(_delta(words, base, offsets, n, RAW, DTYPE, False)).to(tl.int32, bitcast=True)
    word = tl.maximum(tl.load(cut + 1), tl.load(cut + 2)).to(tl.int32)
    return ((x == word) & (offsets < n)).to(tl.int32)


@triton.jit
def ties(
    tensor_of, first_of, words, counts,
    TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`counts` (blocks, TERMS, 2): entries in one block that equal the thresholds of a term's two cuts."""
    _, words, first, n = _block(tensor_of, first_of, words, TERMS, BLOCK)
    offsets = first + tl.arange(0, BLOCK)
    counts += tl.program_id(0).to(tl.int64) * (2 * TERMS)
    base = _load(tl.load(words), offsets, n, DTYPE, False).to(tl.float32)
    for k in tl.static_range(TERMS):
        if KINDS[k] == _CUT:
            term = words + _W + k * _TW
            equal = _equal(term, term + _OUTER, base, offsets, n, RAWS[k], DTYPE)
            tl.store(counts + 2 * k, tl.sum(equal, 0))
            equal = _equal(term, term + _INNER, base, offsets, n, RAWS[k], DTYPE)
            tl.store(counts + 2 * k + 1, tl.sum(equal, 0))


@triton.jit
def _place(
    words, term, cut, first, stop, counts,
    TERMS: tl.constexpr, RAW: tl.constexpr, DTYPE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the place of one cut over the number of equal entries before it, where that is not 0."""
    left = tl.load(cut)
    if left > 0:
        seen, passed, block = left * 0, left * 0, left * 0
        for low in range(first, stop, STEP):
            blocks = low + tl.arange(0, STEP)
            some = tl.load(counts + blocks.to(tl.int64) * (2 * TERMS), mask=blocks < stop, other=0)
            some = some.to(tl.int64)
            # in these blocks is not the last of the equal entries before the place
            whole = ((seen + tl.cumsum(some, 0) < left) & (blocks < stop)).to(tl.int64)
            block += tl.sum(whole, 0)
            passed += tl.sum(whole * some, 0)
            seen += tl.sum(some, 0)
        offsets, n = block * BLOCK + tl.arange(0, BLOCK), tl.load(words + 2)
        base = _load(tl.load(words), offsets, n, DTYPE, False).to(tl.float32)
        reach = tl.cumsum(_equal(term, cut, base, offsets, n, RAW, DTYPE), 0)
        tl.store(cut, block * BLOCK + tl.sum((reach < left - passed).to(tl.int64), 0) + 1)


@triton.jit
def places(
    first_of, words, counts, TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr,
    DTYPE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The places of the cuts of one tensor, from the counts of `ties`; one program for each kind of cut."""
    tensor, inner = tl.program_id(0), tl.program_id(1)
    first, stop = tl.load(first_of + tensor), tl.load(first_of + tensor + 1)
    counts += inner
    words += tensor * (_W + TERMS * _TW)
    for k in tl.static_range(TERMS):
        if KINDS[k] == _CUT:
            term = words + _W + k * _TW
            cut = term + _OUTER + inner * (_INNER - _OUTER)
            _place(words, term, cut, first, stop, counts + 2 * k, TERMS, RAWS[k], DTYPE, STEP, BLOCK)


@triton.jit
def _size(x, HALVINGS: tl.constexpr):
    """Sum of the magnitudes of 2**HALVINGS entries, added as `evomerge.merge.norms` says."""
    x = tl.abs(x)
    for halving in tl.static_range(HALVINGS):
        if halving == 2:
            x = x.to(tl.float64)
        x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.sum(x, 0)


@triton.jit
def norms(
    tensor_of, first_of, words, sums, TERMS: tl.constexpr, KINDS: tl.constexpr, RAWS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """`sums` (blocks, TERMS, 2): of a term's magnitudes in one block, and of what is kept of them."""
    _, words, first, n = _block(tensor_of, first_of, words, TERMS, BLOCK)
    offsets = first + tl.arange(0, BLOCK)
    sums += tl.program_id(0).to(tl.int64) * (2 * TERMS)
    base = _load(tl.load(words), offsets, n, DTYPE, False).to(tl.float32)
    for k in tl.static_range(TERMS):
        term = words + _W + k * _TW
        x = _delta(term, base, offsets, n, RAWS[k], DTYPE, False)
        tl.store(sums + 2 * k, _size(x, HALVINGS))
        x = _kept(x, term, offsets, n, KINDS[k], False)
        tl.store(sums + 2 * k + 1, _size(x, HALVINGS))


@triton.jit
def _plus(high, low, x, y):
    """(high + low) + (x + y) as a float64 and what it is short of; together they lose less than 2**-100."""
    total = high + x
    part = total - high
    rest = (high - (total - part)) + (x - part) + (low + y)
    rounded = total + rest
    return rounded, rest - (rounded - total)


@triton.jit
def _total(sums, first, stop, TERMS: tl.constexpr, STEP: tl.constexpr):
    """Sum over the blocks of a tensor, rounded once: as `math.fsum`, whatever the order."""
    high, low = tl.zeros((STEP,), tl.float64), tl.zeros((STEP,), tl.float64)
    for begin in range(first, stop, STEP):
        blocks = begin + tl.arange(0, STEP)
        some = tl.load(sums + blocks.to(tl.int64) * (2 * TERMS), mask=blocks < stop, other=0.0)
        high, low = _plus(high, low, some, tl.zeros((STEP,), tl.float64))
    high, low = tl.reduce((high, low), 0, _plus)
    return high + low


@triton.jit
def rescale(first_of, sums, weights, numbers, smallest, TERMS: tl.constexpr, STEP: tl.constexpr):
    """factor = weight * (before / after) for one term of one tensor."""
    tensor, k = tl.program_id(0), tl.program_id(1)
    first, stop = tl.load(first_of + tensor), tl.load(first_of + tensor + 1)
    norm = _total(sums + 2 * k, first, stop, TERMS, STEP)
    left = _total(sums + 2 * k + 1, first, stop, TERMS, STEP)
    least, weight = tl.load(smallest), tl.load(weights + tensor * TERMS + k)
    by = tl.where(left >= least, left, 1.0)
    factor = tl.where((norm >= least) & (left >= least), weight * (norm / by), weight)
    tl.store(numbers + tensor * (_N + TERMS * _TN) + _N + k * _TN, factor.to(tl.float32))
