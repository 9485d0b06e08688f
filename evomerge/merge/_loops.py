"""Merging and summing block by block; importing this needs numba.

For any number of terms of any kind. A task vector comes as an address, because a compiled function takes any
number of arrays only through their addresses: that of its float32 entries, or, where it is `raw`, that of a
source's bfloat16 entries, from which the base's are subtracted on the way. The base and the result are
float32, or bfloat16 as uint16. Blocks of entries stay in the first-level cache; every inner loop is one that
the compiler turns into vector instructions.

Imports: numba, numpy, `evomerge.merge._bits`, `evomerge.merge.workers`.
"""

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from evomerge.merge._bits import (
    agreeing,
    bytes_at,
    floats_at,
    halves_at,
    ints_at,
    least_infinite,
    multiply_add,
    put,
    shorts_at,
    widened,
    words_at,
)
from evomerge.merge.workers import BLOCK

KNOWN, DRAWN, BY_SHORT, BY_INT = (np.uint64(n) for n in (1, 2, 3, 4))  # masks, see `_kept` and `_draw`


@register_jitable
def _widen(source, low, out):
    """Entries of the base from `low` on as float32."""
    part = source[low : low + len(out)]
    for i in range(len(out)):
        out[i] = widened(part[i])


@register_jitable
def _above(address, raw, base, limit, factor, x):
    """factor * d for the entries d from an address on, 0 for |d| <= limit; NaN stays."""
    if raw:
        source = carray(halves_at(address), len(x))
        for i in range(len(x)):
            d = widened(source[i]) - base[i]
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
def _draw(draw, low, keep):
    """Which of the entries from `low` on are kept, 1 or 0: those whose hash is below their limit.

    `draw`: how limits are given, two keys, the limit; or the addresses of the entries' classes (int16 or
    int32) and of the limit of each class.
    """
    keys = (np.uint32(draw[1]), np.uint32(draw[2]))
    limits = carray(words_at(draw[4]), 1 << 31)
    if draw[0] == DRAWN:
        limit = np.uint32(draw[3])
        for i in range(len(keep)):
            keep[i] = _hash(np.uint32(low + i), keys) < limit
    elif draw[0] == BY_SHORT:
        shorts = carray(shorts_at(draw[3] + np.uint64(2 * low)), len(keep))
        for i in range(len(keep)):
            keep[i] = _hash(np.uint32(low + i), keys) < limits[np.uint64(shorts[i])]
    else:
        ints = carray(ints_at(draw[3] + np.uint64(4 * low)), len(keep))
        for i in range(len(keep)):
            keep[i] = _hash(np.uint32(low + i), keys) < limits[np.uint64(ints[i])]


@register_jitable
def _kept(draw, low, keep):
    """The entries' part of the mask: drawn into `keep`, or into the mask itself where that has an address."""
    if draw[0] == KNOWN:
        return carray(bytes_at(draw[5] + np.uint64(low)), len(keep))
    if draw[5] != 0:
        part = carray(bytes_at(draw[5] + np.uint64(low)), len(keep))
        _draw(draw, low, part)
        return part
    _draw(draw, low, keep)
    return keep


@register_jitable
def _masked(address, raw, base, keep, factor, x):
    """d * keep * factor for the entries d from an address on."""
    if raw:
        source = carray(halves_at(address), len(x))
        for i in range(len(x)):
            x[i] = (widened(source[i]) - base[i]) * np.float32(keep[i]) * factor
    else:
        delta = carray(floats_at(address), len(x))
        for i in range(len(x)):
            x[i] = delta[i] * np.float32(keep[i]) * factor


@register_jitable
def _term(k, terms, base, low, x, keep):
    """Entries from `low` on of one term: factor * kept(delta); `base` holds the base's in float32.

    `keep` is room for as many entries of a mask.
    """
    addresses, raws, factors, limits, places, draws = terms
    m, width = len(x), np.uint64(2 if raws[k] else 4)
    begin = addresses[k] + width * np.uint64(low)
    if draws[k, 0] != 0:
        _masked(begin, raws[k], base, _kept(draws[k], low, keep), factors[k], x)
        return
    bare = limits[k, 2] < 0
    factor = factors[k] if bare else np.float32(1)
    # outer cut: one limit before its place, another after it; a negative one cuts nothing
    middle = min(max(places[k, 0] - low, 0), m)
    then = begin + width * np.uint64(middle)
    _above(begin, raws[k], base[:middle], limits[k, 0], factor, x[:middle])
    _above(then, raws[k], base[middle:], limits[k, 1], factor, x[middle:])
    if bare:
        return
    # inner cut: what it keeps is dropped
    middle = min(max(places[k, 1] - low, 0), m)
    _below(x[:middle], limits[k, 2])
    _below(x[middle:], limits[k, 3])
    for i in range(m):
        x[i] *= factors[k]


@njit(nogil=True, cache=True, error_model="numpy")  # no test for zero, which would keep it from vectors
def add(source, target, terms, divisor, scale, start, stop):
    """base + scale * (sum of the terms) / divisor on entries [start, stop); whether all are finite."""
    base, mix, x = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    keep = np.empty(BLOCK, np.uint8)
    largest = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, base[:m])
        _term(0, terms, base[:m], low, mix[:m], keep[:m])
        for k in range(1, len(terms[0])):
            _term(k, terms, base[:m], low, x[:m], keep[:m])
            for i in range(m):
                mix[i] += x[i]
        if divisor != np.float32(1):
            for i in range(m):
                mix[i] /= divisor
        part = target[low : low + m]
        for i in range(m):
            largest = max(largest, put(part, i, mix[i] * scale + base[i]))
    return largest < least_infinite(target)


@njit(nogil=True, cache=True, error_model="numpy")
def elect(source, target, terms, weights, normalized, scale, start, stop):
    """As `add`, over the entries whose sign is that of the sum, divided by the weights that agree."""
    xs, base = np.empty((len(weights), BLOCK), np.float32), np.empty(BLOCK, np.float32)
    sign, mix, divisor = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )
    keep = np.empty(BLOCK, np.uint8)
    largest, zero, one = np.uint32(0), np.float32(0), np.float32(1)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, base[:m])
        for i in range(m):
            sign[i], mix[i], divisor[i] = zero, zero, zero
        for k in range(len(weights)):
            _term(k, terms, base[:m], low, xs[k, :m], keep[:m])
            for i in range(m):
                sign[i] += xs[k, i]
        for i in range(m):
            sign[i] = np.copysign(one, sign[i])
        for k in range(len(weights)):
            weight = weights[k]
            for i in range(m):
                agreed = agreeing(xs[k, i], sign[i])
                mix[i] += agreed
                divisor[i] += weight if agreed > zero else zero
        part = target[low : low + m]
        for i in range(m):
            by = divisor[i] if normalized and divisor[i] != zero else one
            largest = max(largest, put(part, i, mix[i] * sign[i] / by * scale + base[i]))
    return largest < least_infinite(target)


@njit(nogil=True, cache=True, error_model="numpy")
def average(source, target, addresses, raws, factors, divisor, start, stop):
    """sum_i factor_i (base + delta_i) / divisor; an address of 0 is a task vector of zeros."""
    total, base = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    largest = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, base[:m])
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
                    total[i] = multiply_add(base[i] + (widened(half[i]) - base[i]), factor, total[i])
            else:
                delta = carray(floats_at(address + np.uint64(4 * low)), m)
                for i in range(m):
                    total[i] = multiply_add(base[i] + delta[i], factor, total[i])
        part = target[low : low + m]
        for i in range(m):
            largest = max(largest, put(part, i, total[i] / divisor))
    return largest < least_infinite(target)


@register_jitable
def _size(x, part):
    """Sum of the magnitudes of a block by halves, two halvings in one loop; `part` holds a quarter."""
    quarter = BLOCK // 4
    for i in range(quarter):
        part[i] = (abs(x[i]) + abs(x[i + 2 * quarter])) + (abs(x[i + quarter]) + abs(x[i + 3 * quarter]))
    while quarter > 2:
        quarter //= 4
        for i in range(quarter):
            part[i] = (part[i] + part[i + 2 * quarter]) + (part[i + quarter] + part[i + 3 * quarter])
    return part[0] + part[1]


@njit(nogil=True, cache=True)
def sizes(source, terms, sums, start, stop):
    """The magnitudes of every term summed by blocks, as `norms.l1` says; `start` is a multiple of one."""
    base, x = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    part, keep = np.empty(BLOCK // 4, np.float64), np.empty(BLOCK, np.uint8)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        if len(source):
            _widen(source, low, base[:m])
        for k in range(len(sums)):
            _term(k, terms, base[:m], low, x[:m], keep[:m])
            for i in range(m, BLOCK):
                x[i] = np.float32(0)
            sums[k, low // BLOCK] = _size(x, part)
