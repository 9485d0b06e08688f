"""Merging a few sources in one loop over their entries; importing this needs numba.

Sources and what is kept of them come as tuples: numba unrolls the walk over a tuple, so that the numbers of
one entry stay in registers from the first load to the store. One version is compiled for each number of
sources and their types. The base and the result are float32, or bfloat16 as uint16; the sources are all
float32 task vectors, or all models' own bfloat16 entries, from which the base's are subtracted.

What is kept of each source is None (everything), a float32 (what is larger in magnitude), two of them (of
this what is no larger than the second), or uint8 (1 where an entry is kept); all of them of one kind.

Imports: numba, numpy, `evomerge.merge._bits`.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload, register_jitable

from evomerge.merge._bits import agreeing, least_infinite, multiply_add, put, widened


def _delta(source, i, base):
    """An entry of the task vector."""


@overload(_delta)
def _delta_for(source, i, base):
    if source.dtype == types.uint16:
        return lambda source, i, base: widened(source[i]) - base
    return lambda source, i, base: source[i]


def _kept(d, keep, i):
    """The entry, 0 if it is not kept; NaN stays."""


@overload(_kept)
def _kept_for(d, keep, i):
    if isinstance(keep, types.NoneType):
        return lambda d, keep, i: d
    if isinstance(keep, types.Float):
        return lambda d, keep, i: np.float32(0) if abs(d) <= keep else d
    if isinstance(keep, types.BaseTuple):  # `or` would be a branch, which keeps the loop from vectors
        return lambda d, keep, i: _kept(np.float32(0) if abs(d) > keep[1] else d, keep[0], i)
    return lambda d, keep, i: d * np.float32(keep[i])


def _terms(sources, keeps, factors, i, base):
    """factor_k * kept(delta_k) of one entry, for each source."""


@overload(_terms)
def _terms_for(sources, keeps, factors, i, base):
    if len(sources) == 0:
        return lambda sources, keeps, factors, i, base: ()
    return lambda sources, keeps, factors, i, base: (
        *_terms(sources[:-1], keeps[:-1], factors[:-1], i, base),
        _kept(_delta(sources[-1], i, base), keeps[-1], i) * factors[-1],
    )


def _sum(numbers):
    """From the first to the last."""


@overload(_sum)
def _sum_for(numbers):
    if len(numbers) == 1:
        return lambda numbers: numbers[0]
    return lambda numbers: _sum(numbers[:-1]) + numbers[-1]


def _elected(numbers, weights, sign):
    """The sum of the magnitudes of the numbers that have this sign, and of their weights."""


@overload(_elected)
def _elected_for(numbers, weights, sign):
    if len(numbers) == 0:
        return lambda numbers, weights, sign: (np.float32(0), np.float32(0))

    def more(numbers, weights, sign):
        mix, divisor = _elected(numbers[:-1], weights[:-1], sign)
        agreed = agreeing(numbers[-1], sign)
        return mix + agreed, divisor + (weights[-1] if agreed > np.float32(0) else np.float32(0))

    return more


def _averaged(sources, factors, i, base):
    """sum_k factor_k (base + delta_k) of one entry."""


@overload(_averaged)
def _averaged_for(sources, factors, i, base):
    if len(sources) == 0:
        return lambda sources, factors, i, base: np.float32(0)
    return lambda sources, factors, i, base: multiply_add(
        base + _delta(sources[-1], i, base), factors[-1], _averaged(sources[:-1], factors[:-1], i, base)
    )


def _part(values, low, high):
    """Entries [low, high) of an array; anything else as it is."""


@overload(_part)
def _part_for(values, low, high):
    if isinstance(values, types.Array):
        return lambda values, low, high: values[low:high]
    return lambda values, low, high: values


def _parts(several, low, high):
    """`_part` of each of a tuple."""


@overload(_parts)
def _parts_for(several, low, high):
    if len(several) == 0:
        return lambda several, low, high: ()
    return lambda several, low, high: (*_parts(several[:-1], low, high), _part(several[-1], low, high))


@register_jitable
def _views(source, target, sources, keeps, start, stop):
    """Entries [start, stop) of everything."""
    read, kept = _parts(sources, start, stop), _parts(keeps, start, stop)
    return source[start:stop], target[start:stop], read, kept


@njit(nogil=True, cache=True, error_model="numpy")  # no test for zero, which would keep it from vectors
def add(source, target, sources, keeps, factors, divisor, scale, start, stop):
    """base + scale * (sum of the terms) / divisor on entries [start, stop); whether all are finite."""
    before, after, read, kept = _views(source, target, sources, keeps, start, stop)
    largest = np.uint32(0)
    for i in range(len(before)):
        base = widened(before[i])
        mix = _sum(_terms(read, kept, factors, i, base)) / divisor
        largest = max(largest, put(after, i, mix * scale + base))
    return largest < least_infinite(target)


@njit(nogil=True, cache=True, error_model="numpy")
def elect(source, target, sources, keeps, factors, weights, normalized, scale, start, stop):
    """As `add`, over the entries whose sign is that of the sum, divided by the weights that agree."""
    before, after, read, kept = _views(source, target, sources, keeps, start, stop)
    largest, zero, one = np.uint32(0), np.float32(0), np.float32(1)
    for i in range(len(before)):
        base = widened(before[i])
        terms = _terms(read, kept, factors, i, base)
        sign = np.copysign(one, zero + _sum(terms))
        mix, divisor = _elected(terms, weights, sign)
        by = divisor if normalized and divisor != zero else one
        largest = max(largest, put(after, i, mix * sign / by * scale + base))
    return largest < least_infinite(target)


@njit(nogil=True, cache=True, error_model="numpy")
def average(source, target, sources, factors, divisor, start, stop):
    """sum_k factor_k (base + delta_k) / divisor."""
    before, after, read, _ = _views(source, target, sources, (), start, stop)
    largest = np.uint32(0)
    for i in range(len(before)):
        mix = _averaged(read, factors, i, widened(before[i]))
        largest = max(largest, put(after, i, mix / divisor))
    return largest < least_infinite(target)
