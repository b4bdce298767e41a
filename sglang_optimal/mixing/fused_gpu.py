"""`mix` for GPUs: one Triton program a row, from both models' logits to the mixture, without a float32 copy of either.

Newton's steps loop inside the kernel, so a row stops as soon as it has converged and nothing waits for the host. Each
step is one pass over the row's logits in their own dtype, which after the first pass come from the L2 cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
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


class Shape(NamedTuple):
    """How a row is gone through; ``bench.gpu.mixing_kernel time --shape`` compares them. Not measured yet."""

    warps: int = 16
    loads: int = 1
    """Of 16 bytes from either model, that a thread makes for a block of tokens."""
    stages: int = 1
    """Blocks under way at a time."""

    def options(self, itemsize: int) -> dict[str, int]:
        """Of a launch, for logits of so many bytes."""
        lane = 16 // itemsize
        block = self.warps * 32 * lane * self.loads
        return {"BLOCK": block, "LANE": lane, "STAGES": self.stages, "num_warps": self.warps}


SHAPE = Shape()

_ESS_BALANCE = tl.constexpr(int(AlphaMethod.ESS_BALANCE))
_REVERSE_KL = tl.constexpr(int(AlphaMethod.REVERSE_KL_SYMMETRY))
_ENTROPY = tl.constexpr(int(AlphaMethod.ENTROPY))
_FIXED = tl.constexpr(int(AlphaMethod.FIXED))
_KL_BUDGET = tl.constexpr(int(AlphaMethod.KL_BUDGET))
_TOLERANCE = tl.constexpr(TOLERANCE)
_KL_TOLERANCE = tl.constexpr(KL_TOLERANCE)
_EQUAL_SQUARE = tl.constexpr(EQUAL)
_TAIL = tl.constexpr(EQUAL_TAIL)
_STEPS = tl.constexpr(MAX_STEPS)
# Below this a sum of weights with a shift that is merely an upper bound has lost digits to underflow.
_UNDERFLOW = tl.constexpr(1e-20)
# Of a mean square, below which a variance that is its difference from a squared mean has lost digits.
_CANCELLED = tl.constexpr(1e-2)
# A Newton step that short is likely the last one.
_LIKELY_LAST = tl.constexpr(0.02)
_INF = tl.constexpr(float("inf"))
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def _folded(x, op: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr):
    """[BLOCK] → [BLOCK / LANE]: what one thread holds of a block becomes one number, so that accumulators are few."""
    x = tl.reshape(x, (BLOCK // LANE, LANE))
    if op == "max":
        return tl.max(x, 1)
    if op == "min":
        return tl.min(x, 1)
    return tl.sum(x, 1)


@triton.jit
def _pair(teacher, student, start, width, BLOCK: tl.constexpr):
    """Logits of one block as float32, and which tokens either masks (or lie beyond the row)."""
    at = start + tl.arange(0, BLOCK)
    inside = at < width
    t = tl.load(teacher + at, mask=inside, other=-_INF).to(tl.float32)
    s = tl.load(student + at, mask=inside, other=-_INF).to(tl.float32)
    return t, s, tl.minimum(t, s) == -_INF


@triton.jit
def _top(
    teacher, student, width, scale, t_shift, s_shift, alpha,
    BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest exponent of `_sums`."""
    top = tl.full((BLOCK // LANE,), -_INF, tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        t, s, dead = _pair(teacher, student, start, width, BLOCK)
        base = s * scale - s_shift
        x = alpha * (t * scale - t_shift - base) + base
        top = tl.maximum(top, _folded(tl.where(dead, -_INF, x), "max", BLOCK, LANE))
    return tl.max(top, 0)


@triton.jit
def _sums(
    teacher, student, out, width, scale, t_shift, s_shift, alpha, write,
    BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ w, Σ w·r, Σ w·r² with w = 2^(base + alpha·r), base = z_s·scale − s_shift, r = z_t·scale − t_shift − base.

    Where ``write``, the mixture at alpha too.
    """
    w0 = tl.zeros((BLOCK // LANE,), tl.float32)
    w1 = tl.zeros((BLOCK // LANE,), tl.float32)
    w2 = tl.zeros((BLOCK // LANE,), tl.float32)
    upper = alpha >= 0.5
    part = tl.where(upper, alpha - 1, alpha)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        t, s, dead = _pair(teacher, student, start, width, BLOCK)
        base = s * scale - s_shift
        r = tl.where(dead, 0.0, t * scale - t_shift - base)
        w = tl.exp2(tl.where(dead, -_INF, alpha * r + base))
        wr = w * r
        w0 += _folded(w, "sum", BLOCK, LANE)
        w1 += _folded(wr, "sum", BLOCK, LANE)
        w2 += _folded(wr * r, "sum", BLOCK, LANE)
        if write:
            z = tl.where(dead, -_INF, part * (t - s) + tl.where(upper, t, s))
            at = start + tl.arange(0, BLOCK)
            tl.store(out + at, z, mask=at < width)
    return tl.sum(w0, 0), tl.sum(w1, 0), tl.sum(w2, 0)


@triton.jit
def _moments(
    teacher, student, out, width, scale, t_shift, s_shift, alpha, write,
    BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(log Σ w, mean, variance) of `_sums`, in nats."""
    shift = 0.0
    # Between the ends the exponent is bounded (by −alpha·center, a few bits); outside [0, 1] it has to be found.
    if (alpha < 0.0) | (alpha > 1.0):
        shift = _top(teacher, student, width, scale, t_shift, s_shift, alpha, BLOCK, LANE, STAGES)
    w0, w1, w2 = _sums(
        teacher, student, out, width, scale, t_shift + shift, s_shift + shift, alpha, write, BLOCK, LANE, STAGES
    )  # fmt: skip
    if w0 < _UNDERFLOW:
        shift = _top(teacher, student, width, scale, t_shift, s_shift, alpha, BLOCK, LANE, STAGES)
        w0, w1, w2 = _sums(
            teacher, student, out, width, scale, t_shift + shift, s_shift + shift, alpha, False, BLOCK, LANE, STAGES
        )  # fmt: skip
    mean = w1 / w0
    variance = w2 / w0 - mean * mean
    return (tl.log2(w0) + shift) * _LN2, mean * _LN2, tl.where(variance < 0.0, 0.0, variance) * (_LN2 * _LN2)


@triton.jit
def _entropies(
    teacher, student, width, scale, t_shift, s_shift, log2_zt, log2_zs,
    BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of teacher and student over the common support, in nats."""
    ts = tl.zeros((BLOCK // LANE,), tl.float32)
    ss = tl.zeros((BLOCK // LANE,), tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        t, s, dead = _pair(teacher, student, start, width, BLOCK)
        end, base = t * scale - t_shift, s * scale - s_shift
        ts += _folded(tl.where(dead, 0.0, tl.exp2(end) * end), "sum", BLOCK, LANE)
        ss += _folded(tl.where(dead, 0.0, tl.exp2(base) * base), "sum", BLOCK, LANE)
    h_t = (log2_zt - tl.sum(ts, 0) / tl.exp2(log2_zt)) * _LN2
    h_s = (log2_zs - tl.sum(ss, 0) / tl.exp2(log2_zs)) * _LN2
    return tl.where(h_t < 0.0, 0.0, h_t), tl.where(h_s < 0.0, 0.0, h_s)


@triton.jit
def _mix_row(
    teacher, student, out, stats, temperatures, methods, alpha_mins, alpha_maxs, fixed_alphas, kl_budgets,
    teacher_stride, student_stride, out_stride, width,
    STATISTICS: tl.constexpr, WANT_ESS: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    student += row * student_stride
    out += row * out_stride
    stats += row * STATISTICS
    scale = 1.0 / tl.load(temperatures + row) * _LOG2E
    method = tl.load(methods + row)

    # 1. maxima and range of the difference over the common support
    t_tops = tl.full((BLOCK // LANE,), -_INF, tl.float32)
    s_tops = tl.full((BLOCK // LANE,), -_INF, tl.float32)
    leasts = tl.full((BLOCK // LANE,), _INF, tl.float32)
    mosts = tl.full((BLOCK // LANE,), -_INF, tl.float32)
    alive = tl.zeros((BLOCK // LANE,), tl.int32)  # NaN is alive, and no maximum
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        t, s, dead = _pair(teacher, student, start, width, BLOCK)
        t_tops = tl.maximum(t_tops, _folded(tl.where(dead, -_INF, t), "max", BLOCK, LANE))
        s_tops = tl.maximum(s_tops, _folded(tl.where(dead, -_INF, s), "max", BLOCK, LANE))
        leasts = tl.minimum(leasts, _folded(tl.where(dead, _INF, t - s), "min", BLOCK, LANE))
        mosts = tl.maximum(mosts, _folded(tl.where(dead, -_INF, t - s), "max", BLOCK, LANE))
        alive = tl.maximum(alive, _folded(tl.where(dead, 0, 1), "max", BLOCK, LANE))
    t_top, s_top = tl.max(t_tops, 0), tl.max(s_tops, 0)
    if tl.max(alive, 0) == 0:
        _only_teacher(teacher, out, stats, width, scale * _LN2, BLOCK, STAGES)
    else:
        # Exponents are in bits, and 0 at each model's maximum, up to the rounding of these two.
        t_shift, s_shift = t_top * scale, s_top * scale

        # 2. both ends, and the middle as the product of their roots
        t0 = tl.zeros((BLOCK // LANE,), tl.float32)
        s0 = tl.zeros((BLOCK // LANE,), tl.float32)
        m0 = tl.zeros((BLOCK // LANE,), tl.float32)
        m1 = tl.zeros((BLOCK // LANE,), tl.float32)
        m2 = tl.zeros((BLOCK // LANE,), tl.float32)
        half = scale * 0.5
        for start in tl.range(0, width, BLOCK, num_stages=STAGES):
            t, s, dead = _pair(teacher, student, start, width, BLOCK)
            end, base = t * half - 0.5 * t_shift, s * half - 0.5 * s_shift
            wt, ws = tl.exp2(tl.where(dead, -_INF, end)), tl.exp2(tl.where(dead, -_INF, base))
            d = tl.where(dead, 0.0, end - base)
            w = wt * ws
            wd = w * d
            t0 += _folded(wt * wt, "sum", BLOCK, LANE)
            s0 += _folded(ws * ws, "sum", BLOCK, LANE)
            m0 += _folded(w, "sum", BLOCK, LANE)
            m1 += _folded(wd, "sum", BLOCK, LANE)
            m2 += _folded(wd * d, "sum", BLOCK, LANE)
        log2_zt, log2_zs = tl.log2(tl.sum(t0, 0)), tl.log2(tl.sum(s0, 0))
        center = log2_zt - log2_zs
        offset = t_shift - s_shift + center
        tail = tl.maximum(tl.abs(tl.min(leasts, 0) * scale - offset), tl.abs(tl.max(mosts, 0) * scale - offset)) * _LN2
        t_center = t_shift + center  # so that r is the difference of log-probabilities

        # 3. alpha
        alpha = tl.load(fixed_alphas + row)
        written = -_INF  # the alpha at which all below is known and the mixture is written
        log_w = 0.0
        mean = 0.0
        if method != _FIXED:
            low, high = tl.load(alpha_mins + row), tl.load(alpha_maxs + row)
            z = tl.sum(m0, 0)
            d1, d2 = 2 * tl.sum(m1, 0) / z, 4 * tl.sum(m2, 0) / z
            mean, variance = (d1 - center) * _LN2, (d2 - d1 * d1) * (_LN2 * _LN2)
            log_w = (tl.log2(z) + (log2_zs - log2_zt) * 0.5) * _LN2
            if (z < _UNDERFLOW) | (variance + mean * mean < d2 * _CANCELLED):
                log_w, mean, variance = _moments(
                    teacher, student, out, width, scale, t_center, s_shift, 0.5, False, BLOCK, LANE, STAGES
                )  # fmt: skip
            if (variance + mean * mean <= _EQUAL_SQUARE) & (tail <= _TAIL):
                alpha = tl.where(method == _KL_BUDGET, high, tl.where(method > _KL_BUDGET, low, (low + high) / 2))
            else:
                if method == _REVERSE_KL:
                    _, kl_ts, _ = _moments(
                        teacher, student, out, width, scale, t_center, s_shift, 1.0, False, BLOCK, LANE, STAGES
                    )  # fmt: skip
                    _, kl_st, _ = _moments(
                        teacher, student, out, width, scale, t_center, s_shift, 0.0, False, BLOCK, LANE, STAGES
                    )  # fmt: skip
                    alpha = kl_ts / (kl_ts - kl_st)
                elif method == _ENTROPY:
                    h_t, h_s = _entropies(
                        teacher, student, width, scale, t_shift, s_shift, log2_zt, log2_zs, BLOCK, LANE, STAGES
                    )  # fmt: skip
                    alpha = tl.where(h_s + h_t == 0.0, 0.5, h_s / (h_s + h_t))
                elif method >= _KL_BUDGET:
                    alpha, written, log_w, mean = _within(
                        teacher, student, out, width, scale, t_center, s_shift, log2_zs * _LN2,
                        tl.where(method == _KL_BUDGET, 1.0, -1.0), tl.load(kl_budgets + row), log_w, mean, variance,
                        BLOCK, LANE, STAGES,
                    )  # fmt: skip
                else:
                    alpha, written, log_w, mean = _root(
                        teacher, student, out, width, scale, t_center, s_shift, method, mean, variance,
                        BLOCK, LANE, STAGES,
                    )  # fmt: skip
                alpha = tl.where(alpha < low, low, alpha)  # so that NaN stays
                alpha = tl.where(alpha > high, high, alpha)

        # 4. what is known at alpha, and the mixture
        if alpha != written:
            log_w, mean, _ = _moments(
                teacher, student, out, width, scale, t_center, s_shift, alpha, True, BLOCK, LANE, STAGES
            )  # fmt: skip
        log_a = log_w - log2_zs * _LN2
        kl_s, kl_t = alpha * mean - log_a, (alpha - 1) * mean - log_a
        tl.store(stats, alpha)
        tl.store(stats + 1, tl.where(kl_s < 0.0, 0.0, kl_s))
        tl.store(stats + 2, tl.where(kl_t < 0.0, 0.0, kl_t))
        tl.store(stats + 3, (log2_zt + t_shift) * _LN2)
        tl.store(stats + 4, (log2_zs + s_shift) * _LN2)
        tl.store(stats + 5, log_w + ((1 - alpha) * s_shift + alpha * t_center) * _LN2)
        if WANT_ESS:
            log_t, _, _ = _moments(
                teacher, student, out, width, scale, t_center, s_shift, 2 - alpha, False, BLOCK, LANE, STAGES
            )  # fmt: skip
            log_s, _, _ = _moments(
                teacher, student, out, width, scale, t_center, s_shift, -alpha, False, BLOCK, LANE, STAGES
            )  # fmt: skip
            tl.store(stats + 6, tl.exp(log_t - log_s))


@triton.jit
def _root(
    teacher, student, out, width, scale, t_shift, s_shift, method, half_mean, half_variance,
    BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Safeguarded Newton in [0, 1] from ½, where the function is known for KL symmetry; see `alpha._newton`.

    For KL symmetry the second derivative comes from the last two slopes, and a pass that is likely the last one writes
    the mixture. Returns alpha, the alpha whose mixture is written (or −∞), and log Σ w and the mean there.
    """
    low = 0.0
    high = 1.0
    alpha = 0.5
    last = 1.0
    moved = 1.0
    value, slope = half_mean, half_variance
    curvature = 0.0
    written = -_INF
    log_w = 0.0
    step = 0
    while step < _STEPS:
        if method == _ESS_BALANCE:
            log_a, mean_a, _ = _moments(
                teacher, student, out, width, scale, t_shift, s_shift, -alpha, False, BLOCK, LANE, STAGES
            )  # fmt: skip
            log_b, mean_b, _ = _moments(
                teacher, student, out, width, scale, t_shift, s_shift, 2 - alpha, False, BLOCK, LANE, STAGES
            )  # fmt: skip
            value = log_a - log_b
            slope = mean_b - mean_a
        elif step > 0:
            before = slope
            write = last <= _LIKELY_LAST
            log_w, value, slope = _moments(
                teacher, student, out, width, scale, t_shift, s_shift, alpha, write, BLOCK, LANE, STAGES
            )  # fmt: skip
            written = tl.where(write, alpha, -_INF)
            curvature = (slope - before) / moved
        step += 1
        if tl.abs(value) <= _TOLERANCE:
            step = _STEPS
        elif value == value:
            low = tl.where(value < 0.0, alpha, low)
            high = tl.where(value < 0.0, high, alpha)
            newton = -value / slope
            target = alpha + newton * (1 - newton * curvature / (2 * slope))
            target = tl.where(slope > 0.0, target, low)
            inside = (low < target) & (target < high) & (tl.abs(target - alpha) <= last / 2)
            target = tl.where(inside, target, (low + high) / 2)
            moved = target - alpha
            last = tl.abs(moved)
            if (last <= _TOLERANCE) & (written == alpha):  # as near as the next one would be, and known
                step = _STEPS
            else:
                alpha = target
                if last <= _TOLERANCE:
                    step = _STEPS
        else:  # NaN stays
            alpha = value
            step = _STEPS
    return alpha, written, log_w, value


@triton.jit
def _within(
    teacher, student, out, width, scale, t_shift, s_shift, log_zs, sign, budget, log_w, mean, variance,
    BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest x in [0, 1] with KL(x) ≤ ``budget``: alpha for the student's budget (sign 1), 1 − alpha for the
    teacher's (sign −1); see `alpha.kl_budget`. Begins with the moments at ½.

    Newton for √(2·KL) with the second derivative, first from x = 0 and the middle, then from the last two slopes. Where
    the middle fits the budget, the end is looked at next. Returns what `_root` does.
    """
    low = 0.0
    high = 1.0
    x = 0.5
    alpha = 0.5
    last = 1.0
    moved = 1.0
    wanted = tl.sqrt(2.0 * budget)
    before = 0.0
    written = -_INF
    step = 0
    if budget <= 0.0:
        x = mean * 0.0  # so that NaN stays
        alpha = tl.where(sign > 0.0, x, 1.0 - x)
        step = _STEPS
    while step < _STEPS:
        kl = x * sign * mean - (log_w - log_zs)
        root = tl.sqrt(tl.where(kl < 0.0, 0.0, 2.0 * kl))
        known = _KL_TOLERANCE * tl.maximum(tl.abs(x * mean), 1.0)
        slope = tl.where(kl <= known, 0.0, x * variance / root)  # that of noise says nothing; 0 bisects
        curvature = tl.where(step == 0, 8.0 * (slope * 0.5 - root), (slope - before) / moved)
        before = slope
        step += 1
        to_end = (kl <= budget) & (step == 1)
        if kl != kl:  # NaN stays
            alpha = kl
            step = _STEPS
        elif (x == 1.0) & (kl <= budget) or (tl.abs(kl - budget) <= known) & (to_end == 0):
            step = _STEPS
        else:
            low = tl.where(kl < budget, x, low)
            high = tl.where(kl < budget, high, x)
            newton = (wanted - root) / slope
            bend = newton * curvature / (2.0 * slope)
            target = x + tl.where(tl.abs(bend) < 0.5, newton / (1.0 + bend), newton)
            inside = (low < target) & (target < high) & (tl.abs(target - x) <= last / 2)
            target = tl.where(inside, target, (low + high) / 2)
            # As far as the slope at ½ can tell, all fits the budget, and the pass over the end is the last one.
            write = to_end & (root + slope * 0.5 <= wanted)
            target = tl.where(to_end, 1.0, target)
            moved = target - x
            last = tl.where(to_end, last, tl.abs(moved))
            if (last <= _TOLERANCE) & (written == alpha):  # as near as the next one would be, and known
                step = _STEPS
            else:
                x = target
                alpha = tl.where(sign > 0.0, x, 1.0 - x)
                if last <= _TOLERANCE:
                    step = _STEPS
                else:
                    write = write | (last <= _LIKELY_LAST)
                    log_w, mean, variance = _moments(
                        teacher, student, out, width, scale, t_shift, s_shift, alpha, write, BLOCK, LANE, STAGES
                    )  # fmt: skip
                    written = tl.where(write, alpha, -_INF)
    return alpha, written, log_w, mean


@triton.jit
def _only_teacher(teacher, out, stats, width, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A row without a common token is the teacher's."""
    tops = tl.full((BLOCK,), -_INF, tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(teacher + at, mask=at < width, other=-_INF).to(tl.float32)
        tl.store(out + at, z, mask=at < width)
        tops = tl.maximum(tops, z)
    top = tl.max(tops, 0)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(teacher + at, mask=at < width, other=-_INF).to(tl.float32)
        weights += tl.where(z == -_INF, 0.0, tl.exp((z - top) * scale))
    tl.store(stats, 1.0)
    tl.store(stats + 1, _INF)
    tl.store(stats + 2, _INF)
    tl.store(stats + 3, -_INF)
    tl.store(stats + 4, -_INF)
    tl.store(stats + 5, tl.where(top == -_INF, -_INF, tl.log(tl.sum(weights, 0)) + top * scale))


def mix_rows(
    teacher: Tensor, student: Tensor, temperature: Tensor, params: AlphaParams, want_ess_ratio: bool, out: Tensor
) -> Tensor:
    """Mix logits on a GPU, without waiting for it; the arguments are those of `mixture.mix`.

    Args:
        teacher, student: [B, V], any float dtype. temperature: [B, 1] float32. out: [B, V] float32, written.

    Returns:
        [B, STATS] float32; the last column is NaN unless ``want_ess_ratio``.

    Raises:
        ValueError: ``out`` is not contiguous in its last dimension.
    """
    if out.stride(-1) != 1:
        raise ValueError("out: must be contiguous in its last dimension.")
    teacher, student = (z if z.stride(-1) == 1 else z.contiguous() for z in (teacher, student))
    stats = torch.full((out.shape[0], STATS), torch.nan, dtype=torch.float32, device=out.device)
    if out.shape[0]:
        _mix_row[(out.shape[0],)](
            teacher, student, out, stats, temperature.reshape(-1).contiguous(),
            params.method, params.alpha_min, params.alpha_max, params.fixed_alpha, params.kl_budget,
            teacher.stride(0), student.stride(0), out.stride(0), out.shape[1],
            STATISTICS=STATS, WANT_ESS=want_ess_ratio, **SHAPE.options(max(teacher.itemsize, student.itemsize)),
        )  # fmt: skip
    return stats
