"""Loops of a decode step that PyTorch has no single call for, compiled by numba: one pass each, no temporaries.

In PyTorch a norm is ten calls and a rotation twenty, which on a small model cost more than the arithmetic, since the
weights that lie between them leave nothing of one step's code and data in a core's cache for the next.

Tensors come as addresses, whose conversion costs a tenth of what a NumPy view does. All arithmetic is float32; bfloat16
is rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, float32, types
from numba.extending import intrinsic, overload
from torch import Tensor

from sglang_optimal.mixing.fused_cpu import exp, in_threads

# Sums may be reordered, which vectorising them needs.
_njit = partial(numba.njit, error_model="numpy", nogil=True, fastmath={"reassoc", "contract", "nsz"})
_in_order = partial(numba.njit, error_model="numpy", nogil=True)

_PRODUCTS_PER_THREAD = 1 << 22
"""Of attention: below this a second thread costs more than it saves; PyTorch's own still spin on its core."""
_AHEAD = 8
"""Tokens of KV that are asked for before they are needed."""


@intrinsic
def _pointer(typingctx, address):
    return types.voidptr(types.int64), lambda c, b, sig, args: b.inttoptr(args[0], ir.IntType(8).as_pointer())


@intrinsic
def _prefetch(typingctx, address):
    """Ask for the line of memory at an address, for reading, into all caches."""

    def code(context, b, sig, args):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = b.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        )
        b.call(ask, [b.inttoptr(args[0], pointer), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def _widened(typingctx, bits):
    """The float32 that a bfloat16's 16 bits stand for."""

    def code(context, b, sig, args):
        wide = b.shl(b.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return b.bitcast(wide, ir.FloatType())

    return types.float32(types.int16), code


@intrinsic
def _narrowed(typingctx, value):
    """The 16 bits of the bfloat16 next to a float32, ties to even; NaN stays one."""

    def code(context, b, sig, args):
        word = ir.IntType(32)
        bits = b.bitcast(args[0], word)
        odd = b.and_(b.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = b.add(bits, b.add(odd, ir.Constant(word, 0x7FFF)))
        nan = b.fcmp_unordered("uno", args[0], args[0])
        kept = b.select(nan, ir.Constant(word, 0x7FC00000), rounded)
        return b.trunc(b.lshr(kept, ir.Constant(word, 16)), ir.IntType(16))

    return types.int16(types.float32), code


def _get(values, i):
    """Element i of an array of float32, or of bfloat16 as int16."""
    raise NotImplementedError


def _put(values, i, value):
    raise NotImplementedError


@overload(_get)
def _get_of(values, i):
    if values.dtype == types.int16:
        return lambda values, i: _widened(values[i])
    return lambda values, i: values[i]


@overload(_put)
def _put_of(values, i, value):
    if values.dtype == types.int16:

        def put(values, i, value):
            values[i] = _narrowed(value)
    else:

        def put(values, i, value):
            values[i] = value

    return put


# -- norms -------------------------------------------------------------------------------------------------------------


@_njit()
def _mean_square(x):
    total = float32(0.0)
    for i in range(x.size):
        total += _get(x, i) * _get(x, i)
    return total / float32(x.size)


@_njit()
def _mean_square_of_sum(x, residual):
    total = float32(0.0)
    for i in range(x.size):
        v = _get(x, i) + _get(residual, i)
        total += v * v
    return total / float32(x.size)


@_in_order()
def _norm_row(x, weight, eps, out):
    scale = float32(1.0) / np.sqrt(_mean_square(x) + eps)
    for i in range(x.size):
        _put(out, i, _get(x, i) * scale * _get(weight, i))


@_in_order()
def _sum_norm_row(x, residual, weight, eps, out, residual_out):
    """The same of x + residual, which is kept, rounded."""
    scale = float32(1.0) / np.sqrt(_mean_square_of_sum(x, residual) + eps)
    for i in range(x.size):
        v = _get(x, i) + _get(residual, i)
        _put(residual_out, i, v)
        _put(out, i, v * scale * _get(weight, i))


# -- rotation ----------------------------------------------------------------------------------------------------------


@_njit()
def _rotate_head(x, cos_sin, neox, out):
    """The first ``cos_sin.size`` elements of a head are pairs: of halves (NeoX), or of neighbours (GPT-J)."""
    half = cos_sin.size // 2
    for i in range(half):
        a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
        c, s = _get(cos_sin, i), _get(cos_sin, i + half)
        va, vb = _get(x, a), _get(x, b)
        _put(out, a, va * c - vb * s)
        _put(out, b, vb * c + va * s)
    for i in range(2 * half, x.size):
        out[i] = x[i]


# -- attention ---------------------------------------------------------------------------------------------------------


@_njit()
def _dot(a, b):
    """Of a float32 array and one of either type."""
    total = float32(0.0)
    for i in range(a.size):
        total += a[i] * _get(b, i)
    return total


@_njit()
def _add_scaled(total, value, factor):
    for i in range(total.size):
        total[i] += factor * _get(value, i)


@_njit()
def _add_four_scaled(total, a, b, c, d, factors):
    """Four at once: the total is read and written once for them."""
    fa, fb, fc, fd = factors[0], factors[1], factors[2], factors[3]
    for i in range(total.size):
        total[i] += fa * _get(a, i) + fb * _get(b, i) + fc * _get(c, i) + fd * _get(d, i)


@_njit()
def _softmax(row):
    """In place."""
    top = row[0]
    for t in range(row.size):
        top = max(top, row[t])
    weight = float32(0.0)
    for t in range(row.size):
        row[t] = exp(row[t] - top)
    for t in range(row.size):
        weight += row[t]
    for t in range(row.size):
        row[t] /= weight


@_njit()
def _prefetch_token(cache, slot, head, heads):
    """Ask for a token's heads of the cache, a line of 64 bytes at a time."""
    size = cache.shape[2] * cache.itemsize
    begin = cache.ctypes.data + (slot * cache.shape[1] + head) * size
    for at in range(0, heads * size, 64):
        _prefetch(begin + at)


@_njit()
def _attend(q, keys, values, slots, head, scale, wide, scores, total, out):
    """Query heads of some heads of the cache: softmax(scale · q·k) v over the tokens in ``slots``.

    A token's heads lie side by side: taking them together reads memory once, in its order.

    Args:
        q: [heads, share, D]. keys: [slots, all heads, D]. values: [slots, all heads, D'].
        head: of the cache, the first of ``q``.
        wide: [heads, share, D], scores: [heads, share, at least tokens], total: [heads, share, D'] float32 scratch.
        out: [heads, share, D'].
    """
    heads, share = q.shape[0], q.shape[1]
    for h in range(heads):
        for s in range(share):
            for i in range(q.shape[2]):
                wide[h, s, i] = _get(q[h, s], i) * scale
    for t in range(slots.size):
        if t + _AHEAD < slots.size:
            _prefetch_token(keys, slots[t + _AHEAD], head, heads)
        for h in range(heads):
            key = keys[slots[t], head + h]
            for s in range(share):
                scores[h, s, t] = _dot(wide[h, s], key)
    for h in range(heads):
        for s in range(share):
            _softmax(scores[h, s][: slots.size])
    total[:] = float32(0.0)
    fours = slots.size // 4 * 4
    for t in range(0, fours, 4):
        for ahead in range(t + _AHEAD, min(t + _AHEAD + 4, slots.size)):
            _prefetch_token(values, slots[ahead], head, heads)
        for h in range(heads):
            a, b = values[slots[t], head + h], values[slots[t + 1], head + h]
            c, d = values[slots[t + 2], head + h], values[slots[t + 3], head + h]
            for s in range(share):
                _add_four_scaled(total[h, s], a, b, c, d, scores[h, s, t : t + 4])
    for t in range(fours, slots.size):
        for h in range(heads):
            value = values[slots[t], head + h]
            for s in range(share):
                _add_scaled(total[h, s], value, scores[h, s, t])
    for h in range(heads):
        for s in range(share):
            for i in range(total.shape[2]):
                _put(out[h, s], i, total[h, s, i])


# -- entries -----------------------------------------------------------------------------------------------------------


_A = types.int64


@cache
def _entries(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The compiled entry points for tensors of a type; they take addresses and sizes."""
    kind = np.int16 if dtype is torch.bfloat16 else np.float32
    compiled = partial(numba.njit, nogil=True, cache=True, error_model="numpy")

    @compiled(types.void(*[_A] * 5, types.float32))
    def rms_norm(x, weight, out, rows, width, eps):
        w = carray(_pointer(weight), (width,), kind)
        a, o = carray(_pointer(x), (rows, width), kind), carray(_pointer(out), (rows, width), kind)
        for row in range(rows):
            _norm_row(a[row], w, eps, o[row])

    @compiled(types.void(*[_A] * 7, types.float32))
    def sum_rms_norm(x, residual, weight, out, residual_out, rows, width, eps):
        w = carray(_pointer(weight), (width,), kind)
        a, r = carray(_pointer(x), (rows, width), kind), carray(_pointer(residual), (rows, width), kind)
        o, ro = carray(_pointer(out), (rows, width), kind), carray(_pointer(residual_out), (rows, width), kind)
        for row in range(rows):
            _sum_norm_row(a[row], r[row], w, eps, o[row], ro[row])

    @compiled(types.boolean(*[_A] * 10, types.boolean))
    def rotate(x, positions, cos_sin, out, rows, heads, size, stride, longest, rotary, neox):
        a = carray(_pointer(x), ((rows - 1) * stride + heads * size,), kind)
        o = carray(_pointer(out), (rows, heads, size), kind)
        at = carray(_pointer(positions), (rows,), np.int64)
        table = carray(_pointer(cos_sin), (longest, rotary), kind)
        for row in range(rows):
            if not 0 <= at[row] < longest:
                return False
            for head in range(heads):
                begin = row * stride + head * size
                _rotate_head(a[begin : begin + size], table[at[row]], neox, o[row, head])
        return True

    @compiled(types.void(*[_A] * 17, types.float32))
    def decode(
        q, keys, values, slots, table, requests, lens, out, scratch, first, step,
        rows, kv_heads, share, width, value_width, longest, scale,
    ):  # fmt: skip
        queries = carray(_pointer(q), (rows, kv_heads, share, width), kind)
        k = carray(_pointer(keys), (slots, kv_heads, width), kind)
        v = carray(_pointer(values), (slots, kv_heads, value_width), kind)
        o = carray(_pointer(out), (rows, kv_heads, share, value_width), kind)
        request, length = carray(_pointer(requests), (rows,), np.int64), carray(_pointer(lens), (rows,), np.int64)
        together = kv_heads if rows >= 2 * step else 1  # few rows are shared out by heads
        parts, group = kv_heads // together, together * share
        size = group * (width + longest + value_width)
        mine = carray(_pointer(scratch + first * size * 4), (size,), np.float32)
        wide = mine[: group * width].reshape((together, share, width))
        total = mine[group * width : group * (width + value_width)].reshape((together, share, value_width))
        scores = mine[group * (width + value_width) :].reshape((together, share, longest))
        for task in range(first, rows * parts, step):
            row, head = task // parts, task % parts * together
            n = max(length[row], 1)  # a row without tokens sees one, so that its softmax is one of something
            tokens = carray(_pointer(table + request[row] * 4), (n,), np.int32)
            last = head + together
            _attend(queries[row, head:last], k, v, tokens, head, scale, wide, scores, total, o[row, head:last])

    return {"rms_norm": rms_norm, "sum_rms_norm": sum_rms_norm, "rotate": rotate, "decode": decode}


def is_plain(*tensors: Tensor) -> bool:
    """Whether the kernels take them: on the CPU, all of one of their types, rows side by side in memory."""
    dtype = tensors[0].dtype
    return (dtype is torch.bfloat16 or dtype is torch.float32) and all(
        t.dtype is dtype and t.is_contiguous() for t in tensors
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x · weight / √(mean x² + eps), rounded once.

    Args:
        x: [n, D], `is_plain` with ``weight`` [D].
    """
    out = torch.empty_like(x)
    rows, width = x.shape
    _entries(x.dtype)["rms_norm"](x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps)
    return out


def sum_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of x + residual, x + residual): the norm is of the sum before it is rounded."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    rows, width = x.shape
    addresses = (t.data_ptr() for t in (x, residual, weight, out, total))
    _entries(x.dtype)["sum_rms_norm"](*addresses, rows, width, eps)
    return out, total


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor, head_size: int, neox: bool) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of the first elements of each head.

    Args:
        x: [n, heads · head_size], rows any distance apart. positions: [n] int64.
        cos_sin: [positions, R] of the same type, cosines before sines.
        neox: whether pairs are halves of the R elements, or neighbours.

    Raises:
        IndexError: a position is beyond the table.
    """
    rows, width = x.shape
    out = x.new_empty((rows, width))
    inside = _entries(x.dtype)["rotate"](
        x.data_ptr(), positions.data_ptr(), cos_sin.data_ptr(), out.data_ptr(),
        rows, width // head_size, head_size, x.stride(0), *cos_sin.shape, neox,
    )  # fmt: skip
    if not inside:
        raise IndexError(f"positions: not all of them are below {len(cos_sin)}, the rotary embedding's length.")
    return out


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, requests: Tensor, lens: Tensor, longest: int, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    """softmax(scale · q·k) v of one new token a row, over KV that is read where it lies.

    Args:
        q: [B, H, D]. keys: [slots, H', D], values: [slots, H', D'], H a multiple of H'; all `is_plain`.
        table: [rows, positions] int32 KV slots. requests: [B] int64, the table's row of each. lens: [B] int64.
        longest: the largest of ``lens``.
        out: [B, H, D'], written.
    """
    rows, heads, width = q.shape
    slots, kv_heads, value_width = values.shape
    share = heads // kv_heads
    tasks = rows * kv_heads
    workers = min(torch.get_num_threads(), tasks, 1 + tasks * share * longest * width // _PRODUCTS_PER_THREAD)
    scratch = torch.empty(workers * heads * (width + longest + value_width), dtype=torch.float32)
    offsets = requests * table.stride(0)
    addresses = [t.data_ptr() for t in (q, keys, values)], [t.data_ptr() for t in (table, offsets, lens, out, scratch)]
    entry = _entries(q.dtype)["decode"]

    def work(first: int, step: int) -> None:
        entry(
            *addresses[0], slots, *addresses[1], first, step,
            rows, kv_heads, share, width, value_width, longest, scale,
        )  # fmt: skip

    in_threads(work, workers)
