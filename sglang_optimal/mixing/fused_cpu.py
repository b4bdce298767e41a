"""`mix` for CPUs: one row at a time, so that it stays in a core's cache, in compiled loops that LLVM vectorises.

A row is read from memory once. Its scaled student logits and their difference to the teacher's go to a scratch buffer
of one row; each Newton step is one pass over that buffer, and the mixture is written in the last. Sums are accumulated
in float32 over short blocks and in float64 over the row.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import float32, int32, types
from numba.extending import intrinsic
from torch import Tensor

from sglang_optimal.mixing.alpha import (
    EQUAL,
    EQUAL_TAIL,
    KL_TOLERANCE,
    MAX_STEPS,
    TOLERANCE,
    AlphaMethod,
    AlphaParams,
)

STATS = 7
"""Numbers a row: alpha, KL to student and teacher, log Z of teacher, student and mixture, ESS ratio."""

_BLOCK = 2048
_MINUS_INF = np.int32(-8388608)  # 0xff800000
_LOWEST = np.int32(-(2**31))
# Outside the support: a finite log 0, because 0·log 0 must be 0, not NaN.
_OUTSIDE = np.float32(-1e30)
# Below this a sum of weights with a shift that is merely an upper bound has lost digits to underflow.
_UNDERFLOW = 1e-20
_ESS_BALANCE = int(AlphaMethod.ESS_BALANCE)
_REVERSE_KL = int(AlphaMethod.REVERSE_KL_SYMMETRY)
_ENTROPY = int(AlphaMethod.ENTROPY)
_FIXED = int(AlphaMethod.FIXED)
_KL_BUDGET = int(AlphaMethod.KL_BUDGET)

# Sums may be reordered, which vectorising them needs. NaN and infinities keep their meaning.
_SUM = {"reassoc", "contract", "nsz"}
_PLAIN = {"contract"}
# A division by zero gives infinity or NaN, which ends a request, and no exception, which would end the scheduler.
_njit = partial(numba.njit, error_model="numpy")


@intrinsic
def _as_float(typingctx, bits):
    """The float32 with these bits."""
    return types.float32(types.int32), lambda c, b, sig, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def _as_bits(typingctx, value):
    """The bits of a float32."""
    return types.int32(types.float32), lambda c, b, sig, args: b.bitcast(args[0], ir.IntType(32))


@_njit(fastmath=_PLAIN)
def exp(x):
    """exp of a float32 in [−87, 88], to about 1 ulp; 0 below; NaN stays (the polynomial of Cephes' expf)."""
    # Adding 1.5·2²³ rounds to an integer, which is then in the low bits.
    shifted = x * float32(1.44269504) + float32(12582912.0)
    n = shifted - float32(12582912.0)
    r = x - n * float32(0.693359375)
    r = r - n * float32(-2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1.0)
    power = _as_float((_as_bits(shifted) << int32(23)) + int32(0x3F800000))
    return float32(0.0) if x < float32(-87.0) else p * power


@_njit()
def _bits(row, i):
    """Bits of element i as float32; a row of int16 holds bfloat16."""
    if row.itemsize == 2:
        return int32(row[i]) << int32(16)
    return int32(row[i])


@_njit()
def _ordered(bits):
    """An int32 that orders as the float32 does (NaN at the ends), because integer maxima vectorise; its own inverse."""
    return bits ^ ((bits >> int32(31)) & int32(0x7FFFFFFF))


@_njit(nogil=True)
def _tops(teacher, student):
    """(tokens in the common support, max of the teacher's logits there, of the student's)."""
    alive, t_top, s_top = 0, _LOWEST, _LOWEST
    for i in range(teacher.size):
        t, s = _bits(teacher, i), _bits(student, i)
        dead = (t == _MINUS_INF) | (s == _MINUS_INF)
        t = _LOWEST if dead else _ordered(t)
        s = _LOWEST if dead else _ordered(s)
        alive += int32(0) if dead else int32(1)
        t_top = max(t_top, t)
        s_top = max(s_top, s)
    return alive, _as_float(_ordered(t_top)), _as_float(_ordered(s_top))


@_njit(nogil=True)
def _load(teacher, student, t_top, s_top, scale, base, delta):
    """Fill a block of the scratch. Returns the smallest and the largest delta in the support, as ordered bits."""
    smallest, largest = int32(0x7FFFFFFF), _LOWEST
    for i in range(base.size):
        tb, sb = _bits(teacher, i), _bits(student, i)
        dead = (tb == _MINUS_INF) | (sb == _MINUS_INF)
        t = (_as_float(tb) - t_top) * scale
        s = (_as_float(sb) - s_top) * scale
        d = float32(0.0) if dead else t - s
        base[i] = _OUTSIDE if dead else s
        delta[i] = d
        key = _ordered(_as_bits(d))
        smallest = min(smallest, int32(0x7FFFFFFF) if dead else key)
        largest = max(largest, _LOWEST if dead else key)
    return smallest, largest


@_njit(nogil=True, fastmath=_SUM)
def _end_sums(base, delta):
    """Sums of a block at both ends: Σ w, Σ w·delta, Σ w·log w with the student's weights, then the teacher's."""
    s0 = s1 = s2 = t0 = t1 = t2 = float32(0.0)
    for i in range(base.size):
        s, d = base[i], delta[i]
        t = s + d
        ws, wt = exp(s), exp(t)
        s0 += ws
        s1 += ws * d
        s2 += ws * s
        t0 += wt
        t1 += wt * d
        t2 += wt * t
    return s0, s1, s2, t0, t1, t2


@_njit(nogil=True, fastmath=_SUM)
def _block_sums(base, delta, alpha, center, shift):
    """Σ w, Σ w·r, Σ w·r² of a block, with w = exp(base + α·delta − shift) and r = delta − center."""
    w0 = w1 = w2 = float32(0.0)
    for i in range(base.size):
        d = delta[i]
        w = exp(base[i] + alpha * d - shift)
        wr = w * (d - center)
        w0 += w
        w1 += wr
        w2 += wr * (d - center)
    return w0, w1, w2


@_njit(nogil=True)
def _top(base, delta, alpha):
    """max of base + α·delta."""
    top = _LOWEST
    for i in range(base.size):
        top = max(top, _ordered(_as_bits(base[i] + alpha * delta[i])))
    return _as_float(_ordered(top))


@_njit(nogil=True)
def _moments(base, delta, alpha, center):
    """(log Σ w, mean, variance) of r under w = exp(base + α·delta), in float64."""
    a, c = float32(alpha), float32(center)
    # Both ends are at most 0, so between them 0 is a bound; outside [0, 1] the maximum has to be found.
    shift = float32(0.0)
    for attempt in range(2):
        if attempt == 1 or a < 0.0 or a > 1.0:
            shift = _top(base, delta, a)
        w0 = w1 = w2 = 0.0
        for lo in range(0, base.size, _BLOCK):
            b0, b1, b2 = _block_sums(base[lo : lo + _BLOCK], delta[lo : lo + _BLOCK], a, c, shift)
            w0 += b0
            w1 += b1
            w2 += b2
        if not w0 < _UNDERFLOW:
            break
    mean = w1 / w0
    return np.log(w0) + shift, mean, max(w2 / w0 - mean * mean, 0.0)


@_njit(nogil=True, fastmath=_PLAIN)
def _interpolate(teacher, student, alpha, out):
    """(1−α)·z_s + α·z_t, exact at α = 0 and 1; what either masks stays masked."""
    upper = alpha >= float32(0.5)
    other = float32(1.0) - alpha
    for i in range(out.size):
        tb, sb = _bits(teacher, i), _bits(student, i)
        t, s = _as_float(tb), _as_float(sb)
        d = t - s
        z = t - other * d if upper else s + alpha * d
        out[i] = float32(-np.inf) if (tb == _MINUS_INF) | (sb == _MINUS_INF) else z


@_njit(nogil=True)
def _root(method, base, delta, center, log_zs, log_zt, half_mean, half_variance):
    """Safeguarded Newton in [0, 1] from ½, where the function is known for KL symmetry; see `alpha._newton`."""
    low, high, alpha, last = 0.0, 1.0, 0.5, 1.0
    for step in range(MAX_STEPS):
        if method == _ESS_BALANCE:
            log_a, mean_a, _ = _moments(base, delta, -alpha, center)
            log_b, mean_b, _ = _moments(base, delta, 2.0 - alpha, center)
            # A(α) = log Σ w − (1−α)·log Z_s − α·log Z_t
            value = log_a - log_b - 2.0 * (log_zs - log_zt)
            slope = mean_b - mean_a
        elif step == 0:
            value, slope = half_mean, half_variance
        else:
            _, value, slope = _moments(base, delta, alpha, center)
        if np.isnan(value):
            return value
        if abs(value) <= TOLERANCE:
            return alpha
        if value < 0.0:
            low = alpha
        else:
            high = alpha
        target = alpha - value / slope if slope > 0.0 else low
        if not (low < target < high and abs(target - alpha) <= last / 2.0):
            target = (low + high) / 2.0
        last = abs(target - alpha)
        alpha = target
        if last <= TOLERANCE:
            break
    return alpha


@_njit(nogil=True)
def _within(sign, budget, base, delta, center, log_zs, half_log_w, half_mean, half_variance, kl_end):
    """The largest x in [0, 1] with KL(x) ≤ ``budget``: alpha for the student's budget (sign 1), 1 − alpha for the
    teacher's (sign −1). KL(0) = 0, KL(1) is ``kl_end``, KL(½) comes from the moments; see `alpha.kl_budget`.

    Newton for √(2·KL) with the second derivative, first from both ends and the middle, then from the last two slopes.
    """
    if np.isnan(half_mean):
        return half_mean
    if budget <= 0.0:
        return 0.0
    if kl_end <= budget:
        return 1.0
    low, high, x, last, moved, before = 0.0, 1.0, 0.5, 1.0, 1.0, 0.0
    wanted = np.sqrt(2.0 * budget)
    for step in range(MAX_STEPS):
        alpha = x if sign > 0.0 else 1.0 - x
        log_w, mean, variance = half_log_w, half_mean, half_variance
        if step > 0:
            log_w, mean, variance = _moments(base, delta, alpha, center)
        kl = x * sign * mean - (log_w - log_zs - alpha * center)
        if np.isnan(kl):
            return kl
        known = KL_TOLERANCE * max(1.0, abs(x * mean))
        if abs(kl - budget) <= known:
            break
        if kl < budget:
            low = x
        else:
            high = x
        target = low
        if kl > known:  # the slope of noise says nothing
            root = np.sqrt(2.0 * kl)
            slope = x * variance / root
            curvature = (slope - before) / moved if step > 0 else 8.0 * (np.sqrt(2.0 * kl_end) - root - slope / 2.0)
            before = slope
            newton = (wanted - root) / slope
            bend = newton * curvature / (2.0 * slope)
            target = x + (newton / (1.0 + bend) if abs(bend) < 0.5 else newton)
        if not (low < target < high and abs(target - x) <= last / 2.0):
            target = (low + high) / 2.0
        moved = target - x
        last = abs(moved)
        x = target
        if last <= TOLERANCE:
            break
    return x


@_njit(nogil=True)
def _mix_row(teacher, student, temperature, method, low, high, fixed, budget, want_ess, base, delta, out, stats):
    n = teacher.size
    scale = float32(1.0 / temperature)
    alive, t_top, s_top = _tops(teacher, student)
    if alive == 0:
        _only_teacher(teacher, scale, out, stats)
        return
    s0 = s1 = s2 = t0 = t1 = t2 = 0.0
    smallest, largest = int32(0x7FFFFFFF), _LOWEST
    for lo in range(0, n, _BLOCK):
        b, d = base[lo : lo + _BLOCK], delta[lo : lo + _BLOCK]
        least, most = _load(teacher[lo : lo + _BLOCK], student[lo : lo + _BLOCK], t_top, s_top, scale, b, d)
        smallest, largest = min(smallest, least), max(largest, most)
        sums = _end_sums(b, d)
        s0 += sums[0]
        s1 += sums[1]
        s2 += sums[2]
        t0 += sums[3]
        t1 += sums[4]
        t2 += sums[5]
    log_zs, log_zt = np.log(s0), np.log(t0)
    center = log_zt - log_zs  # r = log p_t − log p_s = delta − center
    tail = max(abs(_as_float(_ordered(smallest)) - center), abs(_as_float(_ordered(largest)) - center))

    if method == _FIXED:
        alpha = float(fixed)
    else:
        log_w, mean, variance = _moments(base, delta, 0.5, center)
        equal = variance + mean * mean <= EQUAL and tail <= EQUAL_TAIL
        if equal and method < _KL_BUDGET:
            alpha = (low + high) / 2.0
        else:
            kl_ts, kl_st = t1 / t0 - center, center - s1 / s0
            if method >= _KL_BUDGET:
                sign = 1.0 if method == _KL_BUDGET else -1.0
                kl_end = kl_ts if method == _KL_BUDGET else kl_st
                x = 1.0
                if not equal:
                    x = _within(sign, budget, base, delta, center, log_zs, log_w, mean, variance, kl_end)
                alpha = x if method == _KL_BUDGET else 1.0 - x
            elif method == _REVERSE_KL:
                alpha = kl_ts / (kl_ts + kl_st)
            elif method == _ENTROPY:
                h_s, h_t = max(log_zs - s2 / s0, 0.0), max(log_zt - t2 / t0, 0.0)
                alpha = h_s / (h_s + h_t) if h_s + h_t != 0.0 else 0.5
            else:
                alpha = _root(method, base, delta, center, log_zs, log_zt, mean, variance)
            alpha = low if alpha < low else alpha  # so that NaN stays
            alpha = high if alpha > high else alpha
    alpha = float(float32(alpha))

    log_w, mean, _ = _moments(base, delta, alpha, center)
    log_a = log_w - (1.0 - alpha) * log_zs - alpha * log_zt
    kl_s, kl_t = alpha * mean - log_a, (alpha - 1.0) * mean - log_a
    stats[0] = alpha
    stats[1] = 0.0 if kl_s < 0.0 else kl_s
    stats[2] = 0.0 if kl_t < 0.0 else kl_t
    stats[3] = log_zt + t_top * scale
    stats[4] = log_zs + s_top * scale
    stats[5] = log_w + (1.0 - alpha) * s_top * scale + alpha * t_top * scale
    if want_ess:
        log_t, _, _ = _moments(base, delta, 2.0 - alpha, center)
        log_s, _, _ = _moments(base, delta, -alpha, center)
        stats[6] = np.exp(log_t - log_s - 2.0 * center)
    _interpolate(teacher, student, float32(alpha), out)


@_njit(nogil=True)
def _only_teacher(teacher, scale, out, stats):
    """A row without a common token is the teacher's."""
    top = _LOWEST
    for i in range(teacher.size):
        bits = _bits(teacher, i)
        out[i] = _as_float(bits)
        top = max(top, _ordered(bits))
    highest = _as_float(_ordered(top))
    total = 0.0
    if highest > -np.inf:
        for i in range(teacher.size):
            total += exp((out[i] - highest) * scale)
    stats[0] = 1.0
    stats[1] = stats[2] = np.inf
    stats[3] = stats[4] = -np.inf
    stats[5] = np.log(total) + highest * scale if total > 0.0 else -np.inf
    stats[6] = np.nan


@_njit(nogil=True, cache=True)
def _mix_rows(
    teacher, student, strides, width, temperature, method, low, high, fixed, budget, want_ess, out, stats, first, step
):
    """Rows first, first + step, … of flat arrays in which a row starts every ``strides`` elements."""
    base = np.empty(width, np.float32)
    delta = np.empty(width, np.float32)
    for row in range(first, stats.shape[0], step):
        t, s, o = row * strides[0], row * strides[1], row * strides[2]
        _mix_row(
            teacher[t : t + width], student[s : s + width], temperature[row], method[row], low[row], high[row],
            fixed[row], budget[row], want_ess, base, delta, out[o : o + width], stats[row],
        )  # fmt: skip


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="mixing")


def in_threads(work: Callable[[int, int], None], workers: int) -> None:
    """Call ``work(first, workers)`` for each first below ``workers``, the first of them in this thread; it has to let
    go of the interpreter's lock."""
    others = [_threads().submit(work, first, workers) for first in range(1, workers)]
    work(0, workers)
    for other in others:
        other.result()


def mix_rows(
    teacher: Tensor, student: Tensor, temperature: Tensor, params: AlphaParams, want_ess_ratio: bool, out: Tensor
) -> Tensor:
    """Mix logits on a CPU; the arguments are those of `mixture.mix`.

    Args:
        teacher, student: [B, V] float32 or bfloat16 (others are converted). temperature: [B, 1] float32.
        out: [B, V] float32, written.

    Returns:
        [B, STATS] float32; the last column is NaN unless ``want_ess_ratio``.

    Raises:
        ValueError: ``out`` is not contiguous in its last dimension.
    """
    size, width = out.shape
    stats = torch.full((size, STATS), torch.nan, dtype=torch.float64)
    if out.stride(-1) != 1:
        raise ValueError("out: must be contiguous in its last dimension.")
    teacher, student = _bits_of(teacher), _bits_of(student)
    strides = (teacher.stride(0), student.stride(0), out.stride(0))
    tensors = params.method, params.alpha_min, params.alpha_max, params.fixed_alpha, params.kl_budget
    settings = [t.numpy() for t in tensors]
    rows: tuple[Any, ...] = (
        _flat(teacher), _flat(student), strides, width, temperature.reshape(-1).numpy(), *settings,
        want_ess_ratio, _flat(out), stats.numpy(),
    )  # fmt: skip
    workers = max(min(torch.get_num_threads(), size), 1)
    in_threads(partial(_mix_rows, *rows), workers)
    return stats.float()


def _bits_of(logits: Tensor) -> Tensor:
    """The logits' bits: int16 for bfloat16, int32 for float32 and for what is converted to it."""
    logits = logits.detach()
    if logits.dtype is not torch.bfloat16:
        logits = logits.float()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits.view(torch.int16 if logits.dtype is torch.bfloat16 else torch.int32)


def _flat(rows: Tensor) -> np.ndarray:
    """Rows [B, V] of any row stride as one contiguous array, which is what compiled loops vectorise best."""
    size, width = rows.shape
    length = (size - 1) * rows.stride(0) + width if size else 0
    return rows.as_strided((length,), (1,)).numpy()
