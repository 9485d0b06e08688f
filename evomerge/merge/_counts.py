"""The compiled loops of `evomerge.merge.scans` and `evomerge.merge.fingerprint`; importing this needs numba.

Task vectors come as in `_loops`.

Imports: numba, numpy, `evomerge.merge._bits`, `evomerge.merge.workers`.
"""

import numpy as np
from numba import carray, njit
from numba.extending import register_jitable

from evomerge.merge._bits import SIGNLESS, as_word, halves_at, widened, words_at
from evomerge.merge.workers import BLOCK

LOW_BITS = np.uint32(16)  # of a magnitude's word, below those that name its class


@register_jitable
def _magnitudes(address, raw, source, low, m, words):
    """Bits of |delta| on entries [low, low + m); `source` is the base where the task vector is raw."""
    if raw:
        half = carray(halves_at(address + np.uint64(2 * low)), m)
        part = source[low : low + m]
        for i in range(m):
            words[i] = as_word(widened(half[i]) - widened(part[i])) & SIGNLESS
    else:
        delta = carray(words_at(address + np.uint64(4 * low)), m)
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
    counts, words = np.zeros(size, np.uint32), np.empty(BLOCK, np.uint32)
    for low in range(start, stop, BLOCK):
        m = min(BLOCK, stop - low)
        _magnitudes(address, raw, source, low, m, words)
        for i in range(m):
            number = words[i] >> LOW_BITS
            if places[number] >= 0:
                counts[places[number] + ((words[i] & np.uint32(0xFFFF)) >> shifts[number])] += np.uint32(1)
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
def cut(address, raw, source, index, parts, k, early):
    """`MagnitudeIndex.largest` where the class of the k-th largest magnitude was counted.

    `index`: the index's highest class, its entries by class and where the counts of a class end, from the
    highest class and from the lowest one; and the counts. `parts`: where these begin, and the end.

    Returns its word and the flat index of the last entry before the choice changes; -1 twice where it was not
    counted.
    """
    highest, reach, ends, counts = index
    at = np.searchsorted(reach, k)
    rest = k - (reach[at - 1] if at else 0)
    place = len(ends) - 1 - at
    begin, end = ends[place - 1] if place else 0, ends[place]
    for number in range(end - 1, begin - 1, -1):
        equal = np.int64(0)
        for part in range(len(counts)):
            equal += np.int64(counts[part, number])
        if rest > equal:
            rest -= equal
            continue
        word = ((highest - at) << 16) + (1 << 16) // (end - begin) * (number - begin)
        before = rest if early else equal - rest
        if before == 0:
            return word, -1
        if before == equal:
            return word, parts[-1] - 1
        for part in range(len(counts)):
            some = np.int64(counts[part, number])
            if before <= some:
                low, high = parts[part], parts[part + 1]
                return word, nth(address, raw, source, np.uint32(word), before, low, high)
            before -= some
    return -1, -1


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
