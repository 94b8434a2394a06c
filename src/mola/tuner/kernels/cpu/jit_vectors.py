"""Inner loops of small matrix products on vectors of 512 bits, for functions that numba compiles.

Three of them, each over rows that are given by a table of addresses, so that rows may lie anywhere:

- `dot_rows`: products of several rows with several others, summed along memory;
- `add_rows`: multiples of rows added to one row;
- `outer_rows`: sums of multiples of rows, one for every column of coefficients.

Sums are in float32. In bfloat16 the processor multiplies two pairs and adds both products at once (AVX-512 BF16), so
there rows and coefficients come in pairs; a "lane" of four bytes is a float32 or such a pair. Written as LLVM's
instructions, since compilers do not find these loops by themselves. Nothing is checked, addresses least of all.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16  # of 4 bytes in a vector
BLOCK = 2 * LANES  # columns that `outer_rows` makes at once, and the least that `add_rows` can
_BYTES = 4 * LANES
_FIRST_LLVM = 20  # the first one here that names bfloat16 the way these instructions need it

# LLVM's names had the types in them that pointers had.
_PREFETCH = "llvm.prefetch.p0" if llvm.llvm_version_info[0] >= _FIRST_LLVM else "llvm.prefetch.p0i8"

_FLOAT, _BYTE, _HALF, _WORD, _LONG = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)
_HALVES, _PAIRS = ir.VectorType(_HALF, LANES), ir.VectorType(_HALF, 2 * LANES)


class _Bfloat(ir.Type):
    """bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


def has_vectors(*, in_pairs: bool) -> bool:
    """Whether these loops exist on this processor, in float32, or `in_pairs` for bfloat16.

    Not for bfloat16 where the processor has matrix instructions (AMX), which libraries use and these loops do not.
    """
    features = _features()
    if not in_pairs:
        return "+avx512f" in features and "+avx512bw" in features
    return "+avx512bf16" in features and "+amx-bf16" not in features and llvm.llvm_version_info[0] >= _FIRST_LLVM


def _features() -> list[str]:
    """Of the processor that numba compiles for, which its settings may make another than this one."""
    return cpu_target.target_context.codegen().magic_tuple()[2].split(",")


# ---------------------------------------------------------------- single instructions


def _long(number: int) -> ir.Constant:
    return ir.Constant(_LONG, number)


def _at(builder, address, *offsets):
    for offset in offsets:
        address = builder.add(address, offset if isinstance(offset, ir.Value) else _long(offset))
    return address


def _load(builder, address, kind, align: int = 4):
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _store(builder, value, address) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 2


def _address_in(builder, table, index):
    return _load(builder, _at(builder, table, builder.shl(index, _long(3))), _LONG, 8)


def _pick(builder, first, second, places):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_WORD, len(places)), places))


def _everywhere(builder, lane):
    vector = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), lane, ir.Constant(_WORD, 0))
    return _pick(builder, vector, vector, [0] * LANES)


def _prefetch(builder, address) -> None:
    pointer = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, _PREFETCH)
    # To read, as data, into the second cache: asked into the first it gains little.
    how = [ir.Constant(_WORD, number) for number in (0, 2, 1)]
    builder.call(function, [builder.inttoptr(address, pointer), *how])


def _multiply_add(builder, in_pairs: bool, total, first, second):
    if in_pairs:
        operand, name = ir.VectorType(_Bfloat(), 2 * LANES), "llvm.x86.avx512bf16.dpbf16ps.512"
        arguments = [total, builder.bitcast(first, operand), builder.bitcast(second, operand)]
    else:
        operand, name = _FLOATS, f"llvm.fma.v{LANES}f32"
        arguments = [builder.bitcast(first, operand), builder.bitcast(second, operand), total]
    kind = ir.FunctionType(_FLOATS, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _zeros(builder, count: int) -> list[Any]:
    return [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES)) for _ in range(count)]


def _accumulate(builder, in_pairs, total, first, second) -> None:
    builder.store(_multiply_add(builder, in_pairs, builder.load(total), first, second), total)


def _sum(builder, vector):
    """The sum of a vector's numbers."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = list(range(width)), list(range(width, 2 * width))
        vector = builder.fadd(_pick(builder, vector, vector, low), _pick(builder, vector, vector, high))
    return builder.extract_element(vector, ir.Constant(_WORD, 0))


def _sums_of_eight(builder, vectors):
    """The sums of eight vectors as one, of which every step halves the number."""
    low, high = list(range(8)), list(range(8, 16))
    vectors = [builder.fadd(_pick(builder, v, v, low), _pick(builder, v, v, high)) for v in vectors]
    for low, high in (
        ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    ):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(_pick(builder, a, b, low), _pick(builder, a, b, high)) for a, b in pairs]
    return vectors[0]


# ---------------------------------------------------------------- the loops


def _number(kind: Any) -> int:
    return kind.literal_value


def _dot_rows(typing_context, rows, matrix, stride, num_bytes, sums, sums_stride, ahead, count, width, in_pairs):
    """`sums[t, j] = <rows[t], matrix[j]>` for `t < count`, `j < width`.

    Args:
        typing_context: numba's.
        rows: address of a table of `count` addresses.
        matrix: address of the first of `width` rows, `stride` bytes apart.
        stride: see `matrix`.
        num_bytes: of a row, a multiple of 64.
        sums: address of float32 numbers, rows of them `sums_stride` bytes apart.
        sums_stride: see `sums`.
        ahead: constant: how many bytes beyond `rows` to ask for what is wanted soon; 0 to ask for nothing.
        count: constant; `count * width` of at most 24 stay in registers.
        width: constant.
        in_pairs: constant: 1 for bfloat16, 0 for float32.
    """

    def generate(context, builder, signature, arguments):
        rows, matrix, stride, num_bytes, sums, sums_stride = arguments[:6]
        totals = [_zeros(builder, _number(width)) for _ in range(_number(count))]
        left = [_address_in(builder, rows, _long(t)) for t in range(len(totals))]
        distance = _number(ahead)
        right = [matrix]
        for _ in range(1, _number(width)):
            right.append(_at(builder, right[-1], stride))
        with cgutils.for_range_slice(builder, _long(0), num_bytes, _long(_BYTES)) as (offset, _):
            for address in left if distance else ():
                _prefetch(builder, _at(builder, address, offset, distance))
            vectors = [_load(builder, _at(builder, address, offset), _WORDS) for address in left]
            for j, address in enumerate(right):
                vector = _load(builder, _at(builder, address, offset), _WORDS)
                for t, other in enumerate(vectors):
                    _accumulate(builder, _number(in_pairs), totals[t][j], other, vector)
        for row in totals:
            values = [builder.load(total) for total in row]
            if len(values) == 8:
                _store(builder, _sums_of_eight(builder, values), sums)
            else:
                for j, value in enumerate(values):
                    _store(builder, _sum(builder, value), _at(builder, sums, 4 * j))
            sums = _at(builder, sums, sums_stride)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, ahead, count, width, in_pairs), generate


def _add_rows(typing_context, target, rows, offset, coefficients, count, num_vectors, in_pairs):
    """`target += sum_m coefficients[m] * rows[m]`, for `16 * num_vectors` columns.

    Args:
        typing_context: numba's.
        target: address of the first column, float32, or bfloat16 where `in_pairs`.
        rows: address of a table of `count` addresses.
        offset: added to each of them.
        coefficients: address of `count` lanes.
        count: how many rows; in bfloat16 pairs of rows, whose columns alternate.
        num_vectors: constant.
        in_pairs: constant: 1 for bfloat16, 0 for float32.
    """

    def generate(context, builder, signature, arguments):
        target, rows, offset, coefficients, count = arguments[:5]
        pairs = _number(in_pairs)
        places = [_at(builder, target, (2 if pairs else 4) * LANES * v) for v in range(_number(num_vectors))]
        totals = [cgutils.alloca_once_value(builder, _load_floats(builder, place, pairs)) for place in places]
        with cgutils.for_range(builder, count) as loop:
            lane = _load(builder, _at(builder, coefficients, builder.shl(loop.index, _long(2))), _WORD)
            factor = _everywhere(builder, lane)
            row = _at(builder, _address_in(builder, rows, loop.index), offset)
            for v, total in enumerate(totals):
                _accumulate(builder, pairs, total, factor, _load(builder, _at(builder, row, _BYTES * v), _WORDS))
        for place, total in zip(places, totals, strict=True):
            value = builder.load(total)
            if pairs:
                value = builder.bitcast(builder.fptrunc(value, ir.VectorType(_Bfloat(), LANES)), _HALVES)
            _store(builder, value, place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, num_vectors, in_pairs), generate


def _load_floats(builder, address, from_bfloat16):
    if not from_bfloat16:
        return _load(builder, address, _FLOATS)
    bits = builder.zext(_load(builder, address, _HALVES, 2), _WORDS)
    return builder.bitcast(builder.shl(bits, ir.Constant(_WORDS, [16] * LANES)), _FLOATS)


# Of two rows, columns of one and the other in turn: what the processor does at once within each quarter of a vector.
_LOW = [part + 8 * q + i for q in range(4) for i in range(4) for part in (0, 2 * LANES)]
_HIGH = [place + 4 for place in _LOW]
# Hence sums come as columns 0 to 3, 8 to 11, ... and 4 to 7, 12 to 15, ...: brought into order again.
_FIRST = [*range(4), *range(16, 20), *range(4, 8), *range(20, 24)]
_SECOND = [place + 8 for place in _FIRST]


def _outer_rows(typing_context, rows, offset, coefficients, stride, count, targets, targets_offset, width, in_pairs):
    """`targets[j] = sum_m coefficients[m, j] * rows[m]` for `j < width`, for 32 columns.

    Args:
        typing_context: numba's.
        rows: address of a table of addresses, `count` of them, or twice as many where `in_pairs`.
        offset: in bytes, added to each of them.
        coefficients: address of lanes, rows of them `stride` bytes apart.
        stride: see `coefficients`.
        count: how many rows, or pairs of rows.
        targets: address of a table of `width` addresses of float32 numbers.
        targets_offset: in bytes, added to each of them.
        width: constant, at most 9.
        in_pairs: constant: 1 for bfloat16, 0 for float32.
    """

    def generate(context, builder, signature, arguments):
        rows, offset, coefficients, stride, count, targets, targets_offset = arguments[:7]
        pairs = _number(in_pairs)
        totals = [_zeros(builder, 2) for _ in range(_number(width))]
        with cgutils.for_range(builder, count) as loop:
            vectors = _two_vectors(builder, rows, loop.index, offset, pairs)
            lanes = _at(builder, coefficients, builder.mul(loop.index, stride))
            for j, row in enumerate(totals):
                factor = _everywhere(builder, _load(builder, _at(builder, lanes, 4 * j), _WORD))
                for total, vector in zip(row, vectors, strict=True):
                    _accumulate(builder, pairs, total, factor, vector)
        for j, row in enumerate(totals):
            first, second = (builder.load(total) for total in row)
            if pairs:
                first, second = (_pick(builder, first, second, order) for order in (_FIRST, _SECOND))
            place = _at(builder, _address_in(builder, targets, _long(j)), targets_offset)
            _store(builder, first, place)
            _store(builder, second, _at(builder, place, _BYTES))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, width, in_pairs), generate


def _two_vectors(builder, rows, index, offset, in_pairs):
    if not in_pairs:
        row = _at(builder, _address_in(builder, rows, index), offset)
        return [_load(builder, row, _WORDS), _load(builder, _at(builder, row, _BYTES), _WORDS)]
    twice = builder.shl(index, _long(1))
    addresses = _address_in(builder, rows, twice), _address_in(builder, rows, _at(builder, twice, 1))
    one, other = (_load(builder, _at(builder, address, offset), _PAIRS, 2) for address in addresses)
    return [builder.bitcast(_pick(builder, one, other, order), _WORDS) for order in (_LOW, _HIGH)]


def _hold(typing_context, array):
    """Keep an array until here, of which only the address was used: numba frees what is not named any more."""
    return types.void(array), lambda context, builder, signature, arguments: context.get_dummy_value()


dot_rows: Any = intrinsic(prefer_literal=True)(_dot_rows)
add_rows: Any = intrinsic(prefer_literal=True)(_add_rows)
outer_rows: Any = intrinsic(prefer_literal=True)(_outer_rows)
hold: Any = intrinsic(_hold)
