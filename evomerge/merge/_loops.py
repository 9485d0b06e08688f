"""The compiled loops of `evomerge.merge.fused`; importing this needs numba.

A task vector comes as the address of its float32 entries, because a compiled function takes any number of
arrays only through their addresses. The base and the result are float32, or bfloat16 as uint16. Every loop
over a block is one operation on arrays in the first-level cache, which the compiler turns into vector
instructions.

Imports: numba, llvmlite, numpy.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload, register_jitable

BLOCK = 2048  # entries; ten float32 buffers of this size stay in 80 KiB
SPAN = 32  # entries that are looked at together when few are wanted


@intrinsic
def _as_float(typing_context, word):
    """The float32 with the bits of a uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_word(typing_context, number):
    """The bits of a float32 as uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _multiply_add(typing_context, a, b, c):
    """a * b + c, rounded once, as torch's `addcmul` does in float32."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _pointer(kind):
    @intrinsic
    def at(typing_context, address):
        """An address as a pointer."""
        signature = types.CPointer(kind)(types.uint64)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    return at


_floats_at, _bytes_at = _pointer(types.float32), _pointer(types.uint8)


def _widen(source, low, m, out):
    """Entries of the base as float32."""


@overload(_widen)
def _widen_for(source, low, m, out):
    def from_bfloat16(source, low, m, out):
        for i in range(m):
            out[i] = _as_float(np.uint32(source[low + i]) << np.uint32(16))

    def from_float32(source, low, m, out):
        for i in range(m):
            out[i] = source[low + i]

    return from_bfloat16 if source.dtype == types.uint16 else from_float32


def _store(result, m, target, low):
    """Round to the base's dtype, to the nearest and ties to even; 0 if all values are finite."""


@overload(_store)
def _store_for(result, m, target, low):
    def to_bfloat16(result, m, target, low):
        bad = np.uint32(0)
        for i in range(m):
            word = _as_word(result[i])
            short = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            bad |= np.uint32((word & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
            bad |= np.uint32((short & np.uint32(0x7F80)) == np.uint32(0x7F80))
            target[low + i] = np.uint16(short)
        return bad

    def to_float32(result, m, target, low):
        bad = np.uint32(0)
        for i in range(m):
            bad |= np.uint32((_as_word(result[i]) & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
            target[low + i] = result[i]
        return bad

    return to_bfloat16 if target.dtype == types.uint16 else to_float32


@register_jitable
def _above(x, begin, end, limit):
    """Zero what is not larger than `limit` in magnitude; NaN stays."""
    for i in range(begin, end):
        x[i] = np.float32(0) if abs(x[i]) <= limit else x[i]


@register_jitable
def _below(x, begin, end, limit):
    """Zero what is larger than `limit` in magnitude."""
    for i in range(begin, end):
        x[i] = np.float32(0) if abs(x[i]) > limit else x[i]


@register_jitable
def _term(k, terms, low, m, x):
    """Entries [low, low + m) of one term: factor * kept(delta)."""
    addresses, factors, limits, places, masks = terms
    delta = carray(_floats_at(addresses[k] + np.uint64(4 * low)), m)
    for i in range(m):
        x[i] = delta[i]
    if limits[k, 0] >= 0:  # outer cut: one limit before its place, another after it
        middle = min(max(places[k, 0] - low, 0), m)
        _above(x, 0, middle, limits[k, 0])
        _above(x, middle, m, limits[k, 1])
    if limits[k, 2] >= 0:  # inner cut: what it keeps is dropped
        middle = min(max(places[k, 1] - low, 0), m)
        _below(x, 0, middle, limits[k, 2])
        _below(x, middle, m, limits[k, 3])
    if masks[k] != 0:
        keep = carray(_bytes_at(masks[k] + np.uint64(low)), m)
        for i in range(m):
            x[i] *= np.float32(keep[i])
    factor = factors[k]
    for i in range(m):
        x[i] *= factor


@register_jitable
def _finish(mix, scale, source, x, target, low, m):
    """Store base + scale * mix; `x` is a buffer. 0 if all values are finite."""
    if scale != np.float32(1):
        for i in range(m):
            mix[i] *= scale
    _widen(source, low, m, x)
    for i in range(m):
        x[i] += mix[i]
    return _store(x, m, target, low)


@njit(nogil=True, cache=True)
def add(source, target, terms, divisor, scale, start, stop):
    """base + scale * (sum of the terms) / divisor on entries [start, stop); whether all are finite."""
    mix, x = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bad = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _term(0, terms, low, m, mix)
        for k in range(1, len(terms[0])):
            _term(k, terms, low, m, x)
            for i in range(m):
                mix[i] += x[i]
        if divisor != np.float32(1):
            for i in range(m):
                mix[i] /= divisor
        bad |= _finish(mix, scale, source, x, target, low, m)
    return bad == 0


@njit(nogil=True, cache=True)
def elect(source, target, terms, weights, normalized, least, scale, start, stop):
    """As `add`, over the entries whose sign is that of the sum, divided by the weights that agree."""
    xs = np.empty((len(terms[0]), BLOCK), np.float32)
    mix, sign = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    divisor = np.empty(BLOCK, np.float32)
    bad = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        for i in range(m):
            sign[i] = np.float32(0)
        for k in range(len(xs)):
            x = xs[k]
            _term(k, terms, low, m, x)
            for i in range(m):
                sign[i] += x[i]
        for i in range(m):
            sign[i] = np.copysign(np.float32(1), sign[i])
            mix[i] = np.float32(0)
            divisor[i] = np.float32(0)
        for k in range(len(xs)):
            x, weight = xs[k], weights[k]
            for i in range(m):
                agreed = x[i] * sign[i]
                agreed = np.float32(0) if agreed < np.float32(0) else agreed
                mix[i] += agreed
                divisor[i] += weight if agreed > np.float32(0) else np.float32(0)
        for i in range(m):
            mix[i] *= sign[i]
        if normalized:
            for i in range(m):
                by = divisor[i]
                by = max(by, least) if least > np.float32(0) else (np.float32(1) if by == 0 else by)
                mix[i] /= by
        bad |= _finish(mix, scale, source, xs[0], target, low, m)
    return bad == 0


@njit(nogil=True, cache=True)
def average(source, target, addresses, factors, divisor, start, stop):
    """sum_i factor_i (base + delta_i) / divisor; an address of 0 is a task vector of zeros."""
    total, base = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bad = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, m, base)
        for i in range(m):
            total[i] = np.float32(0)
        for k in range(len(addresses)):
            factor = factors[k]
            if addresses[k] == 0:
                for i in range(m):
                    total[i] = _multiply_add(base[i], factor, total[i])
            else:
                delta = carray(_floats_at(addresses[k] + np.uint64(4 * low)), m)
                for i in range(m):
                    total[i] = _multiply_add(base[i] + delta[i], factor, total[i])
        if divisor != np.float32(1):
            for i in range(m):
                total[i] /= divisor
        bad |= _store(total, m, target, low)
    return bad == 0


@njit(nogil=True, cache=True)
def count(bits, mask, wanted, start, stop):
    """Number of entries in [start, stop) with `bits & mask == wanted`."""
    found = 0
    for i in range(start, stop):
        found += (bits[i] & mask) == wanted
    return found


@njit(nogil=True, cache=True)
def members(bits, mask, wanted, start, stop):
    """Their positions, in order."""
    places = np.empty(count(bits, mask, wanted, start, stop), np.int64)
    found = 0
    for low in range(start, stop, SPAN):
        high = min(low + SPAN, stop)
        some = 0
        for i in range(low, high):
            some += (bits[i] & mask) == wanted
        if some:
            for i in range(low, high):
                if (bits[i] & mask) == wanted:
                    places[found] = i
                    found += 1
    return places
