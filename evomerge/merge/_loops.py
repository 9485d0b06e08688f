"""The compiled loops of `evomerge.merge.fused` and `evomerge.merge.norms`; importing this needs numba.

A task vector comes as an address, because a compiled function takes any number of arrays only through their
addresses: that of its float32 entries, or, where it is `raw`, that of a source's bfloat16 entries, from which
the base's are subtracted on the way. The base and the result are float32, or bfloat16 as uint16. Blocks of
entries stay in the first-level cache; every inner loop is one that the compiler turns into vector
instructions.

Imports: numba, numpy, `evomerge.merge._bits`, `evomerge.merge.compiled`.
"""

import numpy as np
from numba import carray, njit, types
from numba.extending import overload, register_jitable

from evomerge.merge._bits import (
    SIGNLESS,
    as_word,
    floats_at,
    halves_at,
    ints_at,
    multiply_add,
    shorts_at,
    widened,
    words_at,
)
from evomerge.merge.compiled import BLOCK  # ten float32 buffers of this size stay in 80 KiB

DRAWN, BY_SHORT, BY_INT = np.uint64(1), np.uint64(2), np.uint64(3)  # how chances are given, see `_drop`


def _widen(source, low, m, out):
    """Entries of the base as float32."""


@overload(_widen)
def _widen_for(source, low, m, out):
    def from_bfloat16(source, low, m, out):
        part = source[low : low + m]
        for i in range(m):
            out[i] = widened(part[i])

    def from_float32(source, low, m, out):
        part = source[low : low + m]
        for i in range(m):
            out[i] = part[i]

    return from_bfloat16 if source.dtype == types.uint16 else from_float32


def _put(part, i, value):
    """Store a float32 in the base's dtype, to the nearest and ties to even; the bits of its magnitude."""


@overload(_put)
def _put_for(part, i, value):
    def as_bfloat16(part, i, value):
        word = as_word(value)
        short = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        part[i] = np.uint16(short)
        return np.uint32(word & SIGNLESS)

    def as_float32(part, i, value):
        part[i] = value
        return np.uint32(as_word(value) & SIGNLESS)

    return as_bfloat16 if part.dtype == types.uint16 else as_float32


def _least_infinite(target):
    """From which bits on a magnitude is not finite once it is stored."""


@overload(_least_infinite)
def _least_infinite_for(target):
    least = 0x7F7F8000 if target.dtype == types.uint16 else 0x7F800000  # bfloat16: what rounds to infinity
    return lambda target: np.uint32(least)


@register_jitable
def _entry(halves, i, base):
    """Entry of a task vector whose source is bfloat16."""
    return widened(halves[i]) - base


@register_jitable
def _above(address, raw, base, limit, factor, x):
    """factor * d for the entries d from an address on, 0 for |d| <= limit; NaN stays."""
    if raw:
        source = carray(halves_at(address), len(x))
        for i in range(len(x)):
            d = _entry(source, i, base[i])
            x[i] = (np.float32(0) if abs(d) <= limit else d) * factor
    else:
        delta = carray(floats_at(address), len(x))
        for i in range(len(x)):
            d = delta[i]
            x[i] = (np.float32(0) if abs(d) <= limit else d) * factor


@register_jitable
def _below(x, limit):
    """Zero what is larger than `limit` in magnitude."""
    for i in range(len(x)):
        x[i] = np.float32(0) if abs(x[i]) > limit else x[i]


@register_jitable
def _hash(index, keys):
    """That of `evomerge.merge.mask`, with the sign bit turned: an order of uint32."""
    x = np.uint32(index + keys[0])
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ keys[1])
    x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(0x80000000))


@register_jitable
def _keep(x, index, keys, limit, factor):
    """x * keep * factor, where an entry is kept if its hash is below the limit."""
    keep = np.float32(1) if _hash(np.uint32(index), keys) < limit else np.float32(0)
    return x * keep * factor


@register_jitable
def _drop(draw, low, factor, x):
    """`_keep` on the entries of `x`, which begin at `low`.

    `draw`: how limits are given, two keys, the limit; or the addresses of the entries' classes (int16 or
    int32) and of the limit of each class.
    """
    keys = (np.uint32(draw[1]), np.uint32(draw[2]))
    limits = carray(words_at(draw[4]), 1 << 31)
    if draw[0] == DRAWN:
        limit = np.uint32(draw[3])
        for i in range(len(x)):
            x[i] = _keep(x[i], low + i, keys, limit, factor)
    elif draw[0] == BY_SHORT:
        shorts = carray(shorts_at(draw[3] + np.uint64(2 * low)), len(x))
        for i in range(len(x)):
            x[i] = _keep(x[i], low + i, keys, limits[np.uint64(shorts[i])], factor)
    else:
        ints = carray(ints_at(draw[3] + np.uint64(4 * low)), len(x))
        for i in range(len(x)):
            x[i] = _keep(x[i], low + i, keys, limits[np.uint64(ints[i])], factor)


@register_jitable
def _term(k, terms, base, low, m, x):
    """Entries [low, low + m) of one term: factor * kept(delta); `base` holds the base's in float32."""
    addresses, raws, factors, limits, places, draws = terms
    bare = limits[k, 2] < 0 and draws[k, 0] == 0
    factor = factors[k] if bare else np.float32(1)
    # outer cut: one limit before its place, another after it; a negative one cuts nothing
    middle = min(max(places[k, 0] - low, 0), m)
    width = np.uint64(2 if raws[k] else 4)
    begin, then = addresses[k] + width * np.uint64(low), addresses[k] + width * np.uint64(low + middle)
    _above(begin, raws[k], base[:middle], limits[k, 0], factor, x[:middle])
    _above(then, raws[k], base[middle:m], limits[k, 1], factor, x[middle:m])
    if bare:
        return
    if limits[k, 2] >= 0:  # inner cut: what it keeps is dropped
        middle = min(max(places[k, 1] - low, 0), m)
        _below(x[:middle], limits[k, 2])
        _below(x[middle:m], limits[k, 3])
    factor = factors[k]
    if draws[k, 0] != 0:
        _drop(draws[k], low, factor, x[:m])
    else:
        for i in range(m):
            x[i] *= factor


def _summed(sources, factors, i, base):
    """sum_k factor_k delta_k of one entry, from the first to the last of a tuple of bfloat16 sources."""


@overload(_summed)
def _summed_for(sources, factors, i, base):
    if len(sources) == 1:
        return lambda sources, factors, i, base: _entry(sources[0], i, base) * factors[0]
    return lambda sources, factors, i, base: (
        _summed(sources[:-1], factors[:-1], i, base) + _entry(sources[-1], i, base) * factors[-1]
    )


def _parts(sources, low, high):
    """The same range of every array of a tuple."""


@overload(_parts)
def _parts_for(sources, low, high):
    if len(sources) == 0:
        return lambda sources, low, high: ()
    return lambda sources, low, high: (*_parts(sources[:-1], low, high), sources[-1][low:high])


@njit(nogil=True, cache=True, error_model="numpy")  # no test for zero, which would keep it from vectors
def add_raw(source, target, sources, factors, divisor, scale, start, stop):
    """`add` in one loop, for terms that take every entry of a bfloat16 source beside a bfloat16 base."""
    largest = np.uint32(0)
    before, after, read = source[start:stop], target[start:stop], _parts(sources, start, stop)
    for i in range(len(before)):
        base = widened(before[i])
        mix = _summed(read, factors, i, base) / divisor
        largest = max(largest, _put(after, i, mix * scale + base))
    return largest < _least_infinite(target)


@njit(nogil=True, cache=True, error_model="numpy")
def add(source, target, terms, divisor, scale, start, stop):
    """base + scale * (sum of the terms) / divisor on entries [start, stop); whether all are finite."""
    base, mix, x = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    largest = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, m, base)
        _term(0, terms, base, low, m, mix)
        for k in range(1, len(terms[0])):
            _term(k, terms, base, low, m, x)
            for i in range(m):
                mix[i] += x[i]
        if divisor != np.float32(1):
            for i in range(m):
                mix[i] /= divisor
        part = target[low : low + m]
        for i in range(m):
            largest = max(largest, _put(part, i, mix[i] * scale + base[i]))
    return largest < _least_infinite(target)


def _total(rows, i):
    """Sum of one entry over a tuple of rows, from 0."""


@overload(_total)
def _total_for(rows, i):
    if len(rows) == 1:
        return lambda rows, i: np.float32(0) + rows[0][i]
    return lambda rows, i: _total(rows[:-1], i) + rows[-1][i]


@register_jitable
def _agreed(entry, sign):
    """The magnitude of an entry that has this sign, of others 0."""
    agreed = entry * sign
    return np.float32(0) if agreed < np.float32(0) else agreed


def _agreeing(rows, weights, i, sign):
    """Of one entry: the sum of the magnitudes that have this sign, and of their weights."""


@overload(_agreeing)
def _agreeing_for(rows, weights, i, sign):
    if len(rows) == 0:
        return lambda rows, weights, i, sign: (np.float32(0), np.float32(0))

    def more(rows, weights, i, sign):
        mix, divisor = _agreeing(rows[:-1], weights[:-1], i, sign)
        agreed = _agreed(rows[-1][i], sign)
        return mix + agreed, divisor + (weights[-1] if agreed > np.float32(0) else np.float32(0))

    return more


def _rows(buffers, weights):
    """A tuple of as many buffers as there are weights."""


@overload(_rows)
def _rows_for(buffers, weights):
    if len(weights) == 0:
        return lambda buffers, weights: ()
    return lambda buffers, weights: (*_rows(buffers, weights[:-1]), buffers[len(weights) - 1])


@njit(nogil=True, cache=True, error_model="numpy")  # no test for zero, which would keep it from vectors
def elect(source, target, terms, weights, normalized, scale, start, stop):
    """As `add`, over the entries whose sign is that of the sum, divided by the weights that agree."""
    xs, base = np.empty((len(weights), BLOCK), np.float32), np.empty(BLOCK, np.float32)
    rows, one = _rows(xs, weights), np.float32(1)
    largest = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, m, base)
        for k in range(len(xs)):
            _term(k, terms, base, low, m, xs[k])
        part = target[low : low + m]
        for i in range(m):
            sign = np.copysign(one, _total(rows, i))
            mix, divisor = _agreeing(rows, weights, i, sign)
            by = divisor if normalized and divisor != np.float32(0) else one
            largest = max(largest, _put(part, i, mix * sign / by * scale + base[i]))
    return largest < _least_infinite(target)


def _averaged(sources, factors, i, base):
    """sum_k factor_k (base + delta_k) of one entry."""


@overload(_averaged)
def _averaged_for(sources, factors, i, base):
    if len(sources) == 0:
        return lambda sources, factors, i, base: np.float32(0)
    return lambda sources, factors, i, base: multiply_add(
        base + _entry(sources[-1], i, base), factors[-1], _averaged(sources[:-1], factors[:-1], i, base)
    )


@njit(nogil=True, cache=True, error_model="numpy")
def average_raw(source, target, sources, factors, divisor, start, stop):
    """`average` in one loop, for bfloat16 sources beside a bfloat16 base."""
    largest = np.uint32(0)
    before, after, read = source[start:stop], target[start:stop], _parts(sources, start, stop)
    for i in range(len(before)):
        base = widened(before[i])
        largest = max(largest, _put(after, i, _averaged(read, factors, i, base) / divisor))
    return largest < _least_infinite(target)


@njit(nogil=True, cache=True, error_model="numpy")
def average(source, target, addresses, raws, factors, divisor, start, stop):
    """sum_i factor_i (base + delta_i) / divisor; an address of 0 is a task vector of zeros."""
    total, base = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    largest = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, m, base)
        for i in range(m):
            total[i] = np.float32(0)
        for k in range(len(addresses)):
            factor, address = factors[k], addresses[k]
            if address == 0:
                for i in range(m):
                    total[i] = multiply_add(base[i], factor, total[i])
            elif raws[k]:
                half = carray(halves_at(address + np.uint64(2 * low)), m)
                for i in range(m):
                    total[i] = multiply_add(base[i] + _entry(half, i, base[i]), factor, total[i])
            else:
                delta = carray(floats_at(address + np.uint64(4 * low)), m)
                for i in range(m):
                    total[i] = multiply_add(base[i] + delta[i], factor, total[i])
        part = target[low : low + m]
        for i in range(m):
            largest = max(largest, _put(part, i, total[i] / divisor))
    return largest < _least_infinite(target)


@njit(nogil=True, cache=True)
def sizes(source, terms, sums, start, stop):
    """The magnitudes of every term summed by blocks, as `norms.l1` says; `start` is a multiple of one."""
    base, x = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    part = np.empty(BLOCK // 2, np.float64)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        if len(source):
            _widen(source, low, m, base)
        for k in range(len(sums)):
            _term(k, terms, base, low, m, x)
            for i in range(m, BLOCK):
                x[i] = np.float32(0)
            half = BLOCK // 2
            for i in range(half):
                part[i] = np.float64(abs(x[i])) + np.float64(abs(x[i + half]))
            while half > 1:
                half //= 2
                for i in range(half):
                    part[i] += part[i + half]
            sums[k, low // BLOCK] = part[0]
