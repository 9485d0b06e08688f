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


def _put(part, i, value):
    """Store a float32 in the base's dtype, to the nearest and ties to even; the bits of its magnitude."""


@overload(_put)
def _put_for(part, i, value):
    def as_bfloat16(part, i, value):
        word = _as_word(value)
        short = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        part[i] = np.uint16(short)
        return np.uint32(word & SIGNLESS)

    def as_float32(part, i, value):
        part[i] = value
        return np.uint32(_as_word(value) & SIGNLESS)

    return as_bfloat16 if part.dtype == types.uint16 else as_float32


def _least_infinite(target):
    """From which bits on a magnitude is not finite once it is stored."""


@overload(_least_infinite)
def _least_infinite_for(target):
    least = 0x7F7F8000 if target.dtype == types.uint16 else 0x7F800000  # bfloat16: what rounds to infinity
    return lambda target: np.uint32(least)


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
def _entry(halves, i, base):
    """Entry of a task vector whose source is bfloat16."""
    return _as_float(np.uint32(halves[i]) << np.uint32(16)) - base


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
        base = _as_float(np.uint32(before[i]) << np.uint32(16))
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
def elect(source, target, terms, weights, normalized, least, scale, start, stop):
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
        if not normalized:
            for i in range(m):
                sign = np.copysign(one, _total(rows, i))
                mix = _agreeing(rows, weights, i, sign)[0] * sign
                largest = max(largest, _put(part, i, mix * scale + base[i]))
        elif least > np.float32(0):  # a divisor is 0 or at least this
            for i in range(m):
                sign = np.copysign(one, _total(rows, i))
                mix, by = _agreeing(rows, weights, i, sign)
                mix = mix * sign / (least if by < least else by)
                largest = max(largest, _put(part, i, mix * scale + base[i]))
        else:
            for i in range(m):
                sign = np.copysign(one, _total(rows, i))
                mix, by = _agreeing(rows, weights, i, sign)
                mix = mix * sign / (one if by == np.float32(0) else by)
                largest = max(largest, _put(part, i, mix * scale + base[i]))
    return largest < _least_infinite(target)


def _averaged(sources, factors, i, base):
    """sum_k factor_k (base + delta_k) of one entry."""


@overload(_averaged)
def _averaged_for(sources, factors, i, base):
    if len(sources) == 0:
        return lambda sources, factors, i, base: np.float32(0)
    return lambda sources, factors, i, base: _multiply_add(
        base + _entry(sources[-1], i, base), factors[-1], _averaged(sources[:-1], factors[:-1], i, base)
    )


@njit(nogil=True, cache=True, error_model="numpy")
def average_raw(source, target, sources, factors, divisor, start, stop):
    """`average` in one loop, for bfloat16 sources beside a bfloat16 base."""
    largest = np.uint32(0)
    before, after, read = source[start:stop], target[start:stop], _parts(sources, start, stop)
    for i in range(len(before)):
        base = _as_float(np.uint32(before[i]) << np.uint32(16))
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
                    total[i] = _multiply_add(base[i], factor, total[i])
            elif raws[k]:
                half = carray(_halves_at(address + np.uint64(2 * low)), m)
                for i in range(m):
                    total[i] = _multiply_add(base[i] + _entry(half, i, base[i]), factor, total[i])
            else:
                delta = carray(_floats_at(address + np.uint64(4 * low)), m)
                for i in range(m):
                    total[i] = _multiply_add(base[i] + delta[i], factor, total[i])
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
def members(address, raw, source, number, start, stop):
    """Of the entries in one class their bits below it, in order, as uint16."""
    words, found = np.empty(BLOCK, np.uint32), np.empty(stop - start + 1, np.uint16)
    count = 0
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        for i in range(m):  # a write for nothing is cheaper than a branch
            found[count] = np.uint16(words[i] & np.uint32(0xFFFF))
            count += np.int64(words[i] >> LOW_BITS == number)
    return found[:count].copy()


@njit(nogil=True, cache=True)
def nth(address, raw, source, wanted, count, start, stop):
    """Position of the `count`-th entry, from 1, in [start, stop) whose magnitude has the bits `wanted`."""
    words = np.empty(BLOCK, np.uint32)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        some = np.uint32(0)
        for i in range(m):
            some += np.uint32(words[i] == wanted)
        if count > some:
            count -= some
            continue
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
