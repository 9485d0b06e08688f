"""Bits, addresses and entries in compiled loops; importing this needs numba.

numba's cache of compiled functions looks at the file of the function alone: after a change here or of
`workers.BLOCK` the loops in `_one_loop`, `_loops` and `_counts` have to be compiled anew: touch their files.

Imports: numba, llvmlite, numpy.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

SIGNLESS = np.uint32(0x7FFFFFFF)


@intrinsic
def as_float(typing_context, word):
    """The float32 with the bits of a uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def as_word(typing_context, number):
    """The bits of a float32 as uint32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def widened(entry):
    """An entry of the base or of a source as float32; a bfloat16 comes as uint16."""


@overload(widened)
def _widened_for(entry):
    if entry == types.uint16:
        return lambda entry: as_float(np.uint32(entry) << np.uint32(16))
    return lambda entry: entry


@intrinsic
def multiply_add(typing_context, a, b, c):
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


floats_at, words_at = _pointer(types.float32), _pointer(types.uint32)
halves_at, shorts_at, ints_at = _pointer(types.uint16), _pointer(types.int16), _pointer(types.int32)
bytes_at = _pointer(types.uint8)


def put(part, i, value):
    """Store a float32 in the base's dtype, to the nearest and ties to even; the bits of its magnitude."""


@overload(put)
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


def least_infinite(target):
    """From which bits on a magnitude is not finite once it is stored."""


@overload(least_infinite)
def _least_infinite_for(target):
    least = 0x7F7F8000 if target.dtype == types.uint16 else 0x7F800000  # bfloat16: what rounds to infinity
    return lambda target: np.uint32(least)


@register_jitable
def agreeing(entry, sign):
    """The magnitude of an entry that has this sign, of others 0."""
    agreed = entry * sign
    return np.float32(0) if agreed < np.float32(0) else agreed
