"""The compiled loops of `evomerge.merge.fused` and `evomerge.merge.scans`; importing this needs numba.

A task vector comes as an address, because a compiled function takes any number of arrays only through their
addresses: that of its float32 entries, or, where it is `raw`, that of a source's bfloat16 entries, from which
the base's are subtracted on the way. The base and the result are float32, or bfloat16 as uint16. Every loop
over a block is one operation on arrays in the first-level cache, which the compiler turns into vector
instructions. All of this is one file, because numba's cache of compiled functions looks at no other.

Imports: numba, llvmlite, numpy, `evomerge.merge.compiled`.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload, register_jitable

from evomerge.merge.compiled import BLOCK  # ten float32 buffers of this size stay in 80 KiB

SPAN = 64  # entries that are looked at together when few are wanted
SIGNLESS = np.uint32(0x7FFFFFFF)
LOW_BITS = np.uint32(16)  # of a magnitude's word, below those that name its class
DRAWN, BY_SHORT, BY_INT = np.uint64(1), np.uint64(2), np.uint64(3)  # how chances are given, see `_drop`


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


_floats_at, _words_at = _pointer(types.float32), _pointer(types.uint32)
_halves_at, _shorts_at, _ints_at = _pointer(types.uint16), _pointer(types.int16), _pointer(types.int32)


def _widen(source, low, m, out):
    """Entries of the base as float32."""


@overload(_widen)
def _widen_for(source, low, m, out):
    def from_bfloat16(source, low, m, out):
        part = source[low : low + m]
        for i in range(m):
            out[i] = _as_float(np.uint32(part[i]) << np.uint32(16))

    def from_float32(source, low, m, out):
        part = source[low : low + m]
        for i in range(m):
            out[i] = part[i]

    return from_bfloat16 if source.dtype == types.uint16 else from_float32


def _store(result, m, target, low):
    """Round to the base's dtype, to the nearest and ties to even; 0 if all values are finite."""


@overload(_store)
def _store_for(result, m, target, low):
    def to_bfloat16(result, m, target, low):
        largest, part = np.uint32(0), target[low : low + m]
        for i in range(m):
            word = _as_word(result[i])
            short = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            largest = max(largest, np.uint32(word & SIGNLESS))
            part[i] = np.uint16(short)
        return np.uint32(largest >= np.uint32(0x7F7F8000))  # from there on words round to infinity

    def to_float32(result, m, target, low):
        largest, part = np.uint32(0), target[low : low + m]
        for i in range(m):
            largest = max(largest, np.uint32(_as_word(result[i]) & SIGNLESS))
            part[i] = result[i]
        return np.uint32(largest >= np.uint32(0x7F800000))

    return to_bfloat16 if target.dtype == types.uint16 else to_float32


@register_jitable
def _above(address, raw, base, limit, factor, x):
    """factor * d for the entries d from an address on, 0 for |d| <= limit; NaN stays."""
    if raw:
        source = carray(_halves_at(address), len(x))
        for i in range(len(x)):
            d = _as_float(np.uint32(source[i]) << np.uint32(16)) - base[i]
            x[i] = (np.float32(0) if abs(d) <= limit else d) * factor
    else:
        delta = carray(_floats_at(address), len(x))
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
    limits = carray(_words_at(draw[4]), 1 << 31)
    if draw[0] == DRAWN:
        limit = np.uint32(draw[3])
        for i in range(len(x)):
            x[i] = _keep(x[i], low + i, keys, limit, factor)
    elif draw[0] == BY_SHORT:
        shorts = carray(_shorts_at(draw[3] + np.uint64(2 * low)), len(x))
        for i in range(len(x)):
            x[i] = _keep(x[i], low + i, keys, limits[np.uint64(shorts[i])], factor)
    else:
        ints = carray(_ints_at(draw[3] + np.uint64(4 * low)), len(x))
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


@register_jitable
def _finish(mix, scale, base, target, low, m):
    """Store base + scale * mix. 0 if all values are finite."""
    if scale != np.float32(1):
        for i in range(m):
            mix[i] *= scale
    for i in range(m):
        mix[i] += base[i]
    return _store(mix, m, target, low)


@njit(nogil=True, cache=True)
def add(source, target, terms, divisor, scale, start, stop):
    """base + scale * (sum of the terms) / divisor on entries [start, stop); whether all are finite."""
    base, mix, x = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bad = np.uint32(0)
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
        bad |= _finish(mix, scale, base, target, low, m)
    return bad == 0


@register_jitable
def _agreeing(x, total, weight, normalized, mix, divisor):
    """Add the entries of a term that have the sign of the total to `mix`, and its weight to their divisor."""
    if normalized:
        for i in range(len(x)):
            agreed = x[i] * np.copysign(np.float32(1), total[i])
            agreed = np.float32(0) if agreed < np.float32(0) else agreed
            mix[i] += agreed
            divisor[i] += weight if agreed > np.float32(0) else np.float32(0)
    else:
        for i in range(len(x)):
            agreed = x[i] * np.copysign(np.float32(1), total[i])
            mix[i] += np.float32(0) if agreed < np.float32(0) else agreed


@register_jitable(error_model="numpy")  # no test for zero, which would keep it from vectors
def _settle(mix, total, divisor, normalized, least):
    """Give `mix` its sign, and divide it."""
    one = np.float32(1)
    if not normalized:
        for i in range(len(mix)):
            mix[i] *= np.copysign(one, total[i])
    elif least > np.float32(0):  # a divisor is 0 or at least this
        for i in range(len(mix)):
            by = least if divisor[i] < least else divisor[i]
            mix[i] = mix[i] * np.copysign(one, total[i]) / by
    else:
        for i in range(len(mix)):
            by = one if divisor[i] == np.float32(0) else divisor[i]
            mix[i] = mix[i] * np.copysign(one, total[i]) / by


@njit(nogil=True, cache=True, error_model="numpy")
def elect(source, target, terms, weights, normalized, least, scale, start, stop):
    """As `add`, over the entries whose sign is that of the sum, divided by the weights that agree."""
    xs = np.empty((len(terms[0]), BLOCK), np.float32)
    base, mix = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    total, divisor = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bad = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, m, base)
        for i in range(m):
            total[i] = np.float32(0)
            mix[i] = np.float32(0)
            divisor[i] = np.float32(0)
        for k in range(len(xs)):
            x = xs[k]
            _term(k, terms, base, low, m, x)
            for i in range(m):
                total[i] += x[i]
        for k in range(len(xs)):
            _agreeing(xs[k][:m], total, weights[k], normalized, mix, divisor)
        _settle(mix[:m], total, divisor, normalized, least)
        bad |= _finish(mix, scale, base, target, low, m)
    return bad == 0


@njit(nogil=True, cache=True)
def average(source, target, addresses, raws, factors, divisor, start, stop):
    """sum_i factor_i (base + delta_i) / divisor; an address of 0 is a task vector of zeros."""
    total, base = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bad = np.uint32(0)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _widen(source, low, m, base)
        for i in range(m):
            total[i] = np.float32(0)
        for k in range(len(addresses)):
            factor, address = factors[k], addresses[k]
            if address == 0:
                for i in range(m):
                    total[i] = _multiply_add(base[i], factor, total[i])
            elif raws[k]:
                half = carray(_halves_at(address + np.uint64(2 * low)), m)
                for i in range(m):
                    d = _as_float(np.uint32(half[i]) << np.uint32(16)) - base[i]
                    total[i] = _multiply_add(base[i] + d, factor, total[i])
            else:
                delta = carray(_floats_at(address + np.uint64(4 * low)), m)
                for i in range(m):
                    total[i] = _multiply_add(base[i] + delta[i], factor, total[i])
        if divisor != np.float32(1):
            for i in range(m):
                total[i] /= divisor
        bad |= _store(total, m, target, low)
    return bad == 0


@njit(nogil=True, cache=True)
def sizes(source, terms, sums, start, stop):
    """The magnitudes of the first term summed by blocks, as `norms.l1` says; `start` is a multiple of one."""
    base, x = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    part = np.empty(BLOCK // 2, np.float64)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        if terms[1][0]:
            _widen(source, low, m, base)
        _term(0, terms, base, low, m, x)
        for i in range(m, BLOCK):
            x[i] = np.float32(0)
        half = BLOCK // 2
        for i in range(half):
            part[i] = np.float64(abs(x[i])) + np.float64(abs(x[i + half]))
        while half > 1:
            half //= 2
            for i in range(half):
                part[i] += part[i + half]
        sums[low // BLOCK] = part[0]


@register_jitable
def _magnitudes(address, raw, source, low, m, words):
    """Bits of |delta| on entries [low, low + m); `source` is the base where the task vector is raw."""
    if raw:
        half = carray(_halves_at(address + np.uint64(2 * low)), m)
        part = source[low : low + m]
        for i in range(m):
            entry = _as_float(np.uint32(half[i]) << np.uint32(16))
            base = _as_float(np.uint32(part[i]) << np.uint32(16))
            words[i] = _as_word(entry - base) & SIGNLESS
    else:
        delta = carray(_words_at(address + np.uint64(4 * low)), m)
        for i in range(m):
            words[i] = delta[i] & SIGNLESS


@njit(nogil=True, cache=True)
def classes(address, raw, source, start, stop):
    """Per class of magnitudes the number of entries in [start, stop) and the bits below the class, or'ed.

    Returns the number of zeros with them.
    """
    counts, bits = np.zeros(1 << 15, np.int64), np.zeros(1 << 15, np.uint32)
    words = np.empty(BLOCK, np.uint32)
    zeros = 0
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        some = np.uint32(0)
        for i in range(m):
            some += np.uint32(words[i] == np.uint32(0))
        zeros += some
        for i in range(m):
            word = words[i]
            number = word >> LOW_BITS
            counts[number] += 1
            bits[number] |= word & np.uint32(0xFFFF)
    return counts, bits, zeros


@njit(nogil=True, cache=True)
def distinct(address, raw, source, places, shifts, size, start, stop):
    """Counts of the magnitudes in some classes: `places` of the classes, -1 for those not wanted.

    The counts of a class stand together; `shifts` is the number of low bits that are 0 throughout it.
    """
    counts, words = np.zeros(size, np.int64), np.empty(BLOCK, np.uint32)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        for i in range(m):
            number = words[i] >> LOW_BITS
            if places[number] >= 0:
                counts[places[number] + ((words[i] & np.uint32(0xFFFF)) >> shifts[number])] += 1
    return counts


@njit(nogil=True, cache=True)
def low_counts(address, raw, source, number, start, stop):
    """Of the entries in one class: how many have which bits below it."""
    counts, words = np.zeros(1 << 16, np.int64), np.empty(BLOCK, np.uint32)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        for begin in range(0, m, SPAN):
            end = min(begin + SPAN, m)
            some = np.uint32(0)
            for i in range(begin, end):
                some += np.uint32(words[i] >> LOW_BITS == number)
            if some:
                for i in range(begin, end):
                    if words[i] >> LOW_BITS == number:
                        counts[words[i] & np.uint32(0xFFFF)] += 1
    return counts


@njit(nogil=True, cache=True)
def equal_counts(address, raw, source, wanted, counts, start, stop):
    """Per block the number of entries whose magnitude has the bits `wanted`; `start` as for `sizes`."""
    words = np.empty(BLOCK, np.uint32)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        some = np.uint32(0)
        for i in range(m):
            some += np.uint32(words[i] == wanted)
        counts[low // BLOCK] = some


@njit(nogil=True, cache=True)
def nth(address, raw, source, wanted, count, start, stop):
    """Position of the `count`-th of them, from 1."""
    words = np.empty(BLOCK, np.uint32)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        for i in range(m):
            count -= words[i] == wanted
            if count == 0:
                return low + i
    return -1


@njit(nogil=True, cache=True)
def word_sum(words):
    """The sum of int16 or int32 words."""
    total = np.int64(0)
    for word in words:
        total += np.int64(word)
    return total


@njit(nogil=True, cache=True)
def placed_sum(words, stride, period):
    """The sum of every `stride`-th word times its place, which counts from 1 to `period` again and again."""
    total = np.int64(0)
    place = np.int64(1)
    for i in range(0, words.size, stride):
        total += np.int64(words[i]) * place
        place = place + 1 if place < period else 1
    return total
