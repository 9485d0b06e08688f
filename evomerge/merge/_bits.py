"""Bits and addresses in compiled loops; importing this needs numba.

numba's cache of compiled functions looks at the file of the function alone: after a change here the loops in
`_loops` and `_counts` have to be compiled anew (their files touched).

Imports: numba, llvmlite, numpy.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

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


@register_jitable
def widened(half):
    """The float32 of a bfloat16, which comes as uint16."""
    return as_float(np.uint32(half) << np.uint32(16))


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
