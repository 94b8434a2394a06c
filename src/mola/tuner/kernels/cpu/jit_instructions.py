"""Single instructions of LLVM on vectors of 512 bits, for the loops in `jit_vectors`.

A "lane" of four bytes is one float32 or a pair of bfloat16. Addresses are integers. Nothing is checked.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba.core import cgutils
from numba.core.registry import cpu_target

LANES = 16  # of 4 bytes in a vector
BYTES = 4 * LANES
_FIRST_LLVM = 20  # the first version whose bfloat16 type fits these instructions

# In earlier versions, names of LLVM's functions contained the types of their pointers.
_PREFETCH = "llvm.prefetch.p0" if llvm.llvm_version_info[0] >= _FIRST_LLVM else "llvm.prefetch.p0i8"

_FLOAT, _BYTE, _HALF, WORD, LONG = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOATS, WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(WORD, LANES)
_HALVES, PAIRS = ir.VectorType(_HALF, LANES), ir.VectorType(_HALF, 2 * LANES)


class _Bfloat(ir.Type):
    """The type bfloat16, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def has_vectors(*, is_bf16: bool) -> bool:
    """Whether the processor has the instructions of `jit_vectors` for float32 or, if `is_bf16`, for bfloat16.

    For bfloat16 also False if the processor has matrix instructions (AMX): libraries that use them are faster.
    """
    features = _features()
    if not is_bf16:
        return "+avx512f" in features and "+avx512bw" in features
    return "+avx512bf16" in features and "+amx-bf16" not in features and llvm.llvm_version_info[0] >= _FIRST_LLVM


def _features() -> list[str]:
    """Features of the CPU that numba compiles for; numba can be configured for a CPU other than this machine's."""
    return cpu_target.target_context.codegen().magic_tuple()[2].split(",")


def int64(number: int) -> ir.Constant:
    """A number as a 64-bit constant of LLVM."""
    return ir.Constant(LONG, number)


def shift(builder, address, *offsets):
    """An address with offsets added, in bytes."""
    for offset in offsets:
        address = builder.add(address, offset if isinstance(offset, ir.Value) else int64(offset))
    return address


def load(builder, address, kind, align: int = 4):
    """Read a value of an LLVM type from an address."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store(builder, value, address) -> None:
    """Write a value to an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 2


def load_address(builder, table, index):
    """Entry `index` of a table of addresses."""
    return load(builder, shift(builder, table, builder.shl(index, int64(3))), LONG, 8)


def shuffle(builder, first, second, places):
    """A vector of elements of two vectors; `places` count through the first vector and continue in the second."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(WORD, len(places)), places))


def broadcast(builder, lane):
    """A vector that holds one lane at all places."""
    vector = builder.insert_element(ir.Constant(WORDS, ir.Undefined), lane, ir.Constant(WORD, 0))
    return shuffle(builder, vector, vector, [0] * LANES)


def prefetch(builder, address) -> None:
    """Fetch the cache line at an address, without waiting for it."""
    pointer = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, WORD, WORD, WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, _PREFETCH)
    # For reading, into the second cache (into the first one it gains little), as data.
    how = [ir.Constant(WORD, number) for number in (0, 2, 1)]
    builder.call(function, [builder.inttoptr(address, pointer), *how])


def _multiply_add(builder, is_bf16: bool, total, first, second):
    if is_bf16:
        operand, name = ir.VectorType(_Bfloat(), 2 * LANES), "llvm.x86.avx512bf16.dpbf16ps.512"
        arguments = [total, builder.bitcast(first, operand), builder.bitcast(second, operand)]
    else:
        operand, name = FLOATS, f"llvm.fma.v{LANES}f32"
        arguments = [builder.bitcast(first, operand), builder.bitcast(second, operand), total]
    kind = ir.FunctionType(FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def zeros(builder, count: int) -> list[Any]:
    """Variables for vectors of sums, initialised with 0."""
    return [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES)) for _ in range(count)]


def accumulate(builder, is_bf16, total, first, second) -> None:
    """Add the products of two vectors' lanes to a sum; `is_bf16`: of two bfloat16 in each lane."""
    builder.store(_multiply_add(builder, is_bf16, builder.load(total), first, second), total)


def lane_sum(builder, vector):
    """The sum of the lanes of a vector, as float32."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = list(range(width)), list(range(width, 2 * width))
        vector = builder.fadd(shuffle(builder, vector, vector, low), shuffle(builder, vector, vector, high))
    return builder.extract_element(vector, ir.Constant(WORD, 0))


def sums_of_eight(builder, vectors):
    """The lane sums of eight vectors as one vector of eight; every step halves the number of vectors."""
    low, high = list(range(8)), list(range(8, 16))
    vectors = [builder.fadd(shuffle(builder, v, v, low), shuffle(builder, v, v, high)) for v in vectors]
    for low, high in (
        ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    ):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(shuffle(builder, a, b, low), shuffle(builder, a, b, high)) for a, b in pairs]
    return vectors[0]


def load_floats(builder, address, from_bfloat16):
    """Read a vector of float32 from 16 numbers in float32 or bfloat16."""
    if not from_bfloat16:
        return load(builder, address, FLOATS)
    bits = builder.zext(load(builder, address, _HALVES, 2), WORDS)
    return builder.bitcast(builder.shl(bits, ir.Constant(WORDS, [16] * LANES)), FLOATS)


def to_bfloat16(builder, vector):
    """A vector of float32 rounded to bfloat16, as 16-bit integers with its bits."""
    return builder.bitcast(builder.fptrunc(vector, ir.VectorType(_Bfloat(), LANES)), _HALVES)
