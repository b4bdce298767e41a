"""`mix` for GPUs: one Triton program a row, from both models' logits to the mixture, without a float32 copy of either.

Newton's steps loop inside the kernel, so a row stops as soon as it has converged and nothing waits for the host. Each
step is one pass over the row's logits in their own dtype, which after the first pass come from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_optimal.mixing.alpha import EQUAL, EQUAL_TAIL, MAX_STEPS, TOLERANCE, AlphaMethod, AlphaParams

STATS = 7
"""Numbers a row: alpha, KL to student and teacher, log Z of teacher, student and mixture, ESS ratio."""

_BLOCK = 4096
_WARPS = 16
_KL_SYMMETRY = tl.constexpr(int(AlphaMethod.KL_SYMMETRY))
_ESS_BALANCE = tl.constexpr(int(AlphaMethod.ESS_BALANCE))
_REVERSE_KL = tl.constexpr(int(AlphaMethod.REVERSE_KL_SYMMETRY))
_ENTROPY = tl.constexpr(int(AlphaMethod.ENTROPY))
_TOLERANCE = tl.constexpr(TOLERANCE)
_EQUAL_SQUARE = tl.constexpr(EQUAL)
_TAIL = tl.constexpr(EQUAL_TAIL)
_STEPS = tl.constexpr(MAX_STEPS)
# Below this a sum of weights with a shift that is merely an upper bound has lost digits to underflow.
_UNDERFLOW = tl.constexpr(1e-20)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _pair(teacher, student, start, width, BLOCK: tl.constexpr):
    """Logits of one block as float32, and which tokens either masks (or lie beyond the row)."""
    at = start + tl.arange(0, BLOCK)
    inside = at < width
    t = tl.load(teacher + at, mask=inside, other=-_INF).to(tl.float32)
    s = tl.load(student + at, mask=inside, other=-_INF).to(tl.float32)
    return t, s, (t == -_INF) | (s == -_INF)


@triton.jit
def _scaled(teacher, student, start, width, t_top, s_top, scale, BLOCK: tl.constexpr):
    """(z_s − max)/T, the teacher's minus it, and what is masked, of one block."""
    t, s, dead = _pair(teacher, student, start, width, BLOCK)
    base = (s - s_top) * scale
    delta = tl.where(dead, 0.0, (t - t_top) * scale - base)
    return base, delta, dead


@triton.jit
def _top(teacher, student, width, t_top, s_top, scale, alpha, BLOCK: tl.constexpr):
    """max of base + alpha·delta."""
    top = tl.full((BLOCK,), -_INF, tl.float32)
    for start in range(0, width, BLOCK):
        base, delta, dead = _scaled(teacher, student, start, width, t_top, s_top, scale, BLOCK)
        top = tl.maximum(top, tl.where(dead, -_INF, base + alpha * delta))
    return tl.max(top, 0)


@triton.jit
def _sums(teacher, student, width, t_top, s_top, scale, alpha, center, shift, BLOCK: tl.constexpr):
    """Σ w, Σ w·r, Σ w·r² with w = exp(base + alpha·delta − shift) and r = delta − center."""
    w0 = tl.zeros((BLOCK,), tl.float32)
    w1 = tl.zeros((BLOCK,), tl.float32)
    w2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        base, delta, dead = _scaled(teacher, student, start, width, t_top, s_top, scale, BLOCK)
        w = tl.where(dead, 0.0, tl.exp(base + alpha * delta - shift))
        r = delta - center
        w0 += w
        w1 += w * r
        w2 += w * r * r
    return tl.sum(w0, 0), tl.sum(w1, 0), tl.sum(w2, 0)


@triton.jit
def _moments(teacher, student, width, t_top, s_top, scale, alpha, center, BLOCK: tl.constexpr):
    """(log Σ w, mean, variance) of r under w = exp(base + alpha·delta)."""
    shift = 0.0
    # Both ends are at most 0, so between them 0 is a bound; outside [0, 1] the maximum has to be found.
    if (alpha < 0.0) | (alpha > 1.0):
        shift = _top(teacher, student, width, t_top, s_top, scale, alpha, BLOCK)
    w0, w1, w2 = _sums(teacher, student, width, t_top, s_top, scale, alpha, center, shift, BLOCK)
    if w0 < _UNDERFLOW:
        shift = _top(teacher, student, width, t_top, s_top, scale, alpha, BLOCK)
        w0, w1, w2 = _sums(teacher, student, width, t_top, s_top, scale, alpha, center, shift, BLOCK)
    mean = w1 / w0
    variance = w2 / w0 - mean * mean
    return tl.log(w0) + shift, mean, tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def _mix_row(
    teacher, student, out, stats, temperatures, methods, alpha_mins, alpha_maxs, fixed_alphas,
    teacher_stride, student_stride, out_stride, width,
    STATISTICS: tl.constexpr, WANT_ESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    student += row * student_stride
    out += row * out_stride
    stats += row * STATISTICS
    scale = 1.0 / tl.load(temperatures + row)
    method = tl.load(methods + row)

    # 1. maxima and range of the difference over the common support
    t_tops = tl.full((BLOCK,), -_INF, tl.float32)
    s_tops = tl.full((BLOCK,), -_INF, tl.float32)
    leasts = tl.full((BLOCK,), _INF, tl.float32)
    mosts = tl.full((BLOCK,), -_INF, tl.float32)
    alive = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        t, s, dead = _pair(teacher, student, start, width, BLOCK)
        t_tops = tl.maximum(t_tops, tl.where(dead, -_INF, t))
        s_tops = tl.maximum(s_tops, tl.where(dead, -_INF, s))
        leasts = tl.minimum(leasts, tl.where(dead, _INF, t - s))
        mosts = tl.maximum(mosts, tl.where(dead, -_INF, t - s))
        alive += tl.where(dead, 0, 1)
    t_top, s_top = tl.max(t_tops, 0), tl.max(s_tops, 0)
    if tl.sum(alive, 0) == 0:
        _only_teacher(teacher, out, stats, width, scale, BLOCK)
    else:
        # 2. both ends
        s0 = tl.zeros((BLOCK,), tl.float32)
        s1 = tl.zeros((BLOCK,), tl.float32)
        s2 = tl.zeros((BLOCK,), tl.float32)
        t0 = tl.zeros((BLOCK,), tl.float32)
        t1 = tl.zeros((BLOCK,), tl.float32)
        t2 = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            base, delta, dead = _scaled(teacher, student, start, width, t_top, s_top, scale, BLOCK)
            end = base + delta
            ws = tl.where(dead, 0.0, tl.exp(base))
            wt = tl.where(dead, 0.0, tl.exp(end))
            s0 += ws
            s1 += ws * delta
            s2 += tl.where(dead, 0.0, ws * base)
            t0 += wt
            t1 += wt * delta
            t2 += tl.where(dead, 0.0, wt * end)
        z_s, z_t = tl.sum(s0, 0), tl.sum(t0, 0)
        log_zs, log_zt = tl.log(z_s), tl.log(z_t)
        center = log_zt - log_zs
        offset = (t_top - s_top) * scale + center
        tail = tl.maximum(tl.abs(tl.min(leasts, 0) * scale - offset), tl.abs(tl.max(mosts, 0) * scale - offset))

        # 3. alpha
        alpha = tl.load(fixed_alphas + row)
        if (method >= _KL_SYMMETRY) & (method <= _ENTROPY):
            low, high = tl.load(alpha_mins + row), tl.load(alpha_maxs + row)
            _, mean, variance = _moments(teacher, student, width, t_top, s_top, scale, 0.5, center, BLOCK)
            if (variance + mean * mean <= _EQUAL_SQUARE) & (tail <= _TAIL):
                alpha = (low + high) / 2
            else:
                if method == _REVERSE_KL:
                    kl_ts = tl.sum(t1, 0) / z_t - center
                    kl_st = center - tl.sum(s1, 0) / z_s
                    alpha = kl_ts / (kl_ts + kl_st)
                elif method == _ENTROPY:
                    h_s = log_zs - tl.sum(s2, 0) / z_s
                    h_t = log_zt - tl.sum(t2, 0) / z_t
                    h_s = tl.where(h_s < 0.0, 0.0, h_s)
                    h_t = tl.where(h_t < 0.0, 0.0, h_t)
                    alpha = tl.where(h_s + h_t == 0.0, 0.5, h_s / (h_s + h_t))
                else:
                    alpha = _root(
                        teacher, student, width, t_top, s_top, scale, center, method, log_zs, log_zt, mean, variance,
                        BLOCK,
                    )  # fmt: skip
                alpha = tl.where(alpha < low, low, alpha)  # so that NaN stays
                alpha = tl.where(alpha > high, high, alpha)

        # 4. what is known at alpha, and the mixture
        log_w, mean, _ = _moments(teacher, student, width, t_top, s_top, scale, alpha, center, BLOCK)
        log_a = log_w - (1 - alpha) * log_zs - alpha * log_zt
        kl_s, kl_t = alpha * mean - log_a, (alpha - 1) * mean - log_a
        tl.store(stats, alpha)
        tl.store(stats + 1, tl.where(kl_s < 0.0, 0.0, kl_s))
        tl.store(stats + 2, tl.where(kl_t < 0.0, 0.0, kl_t))
        tl.store(stats + 3, log_zt + t_top * scale)
        tl.store(stats + 4, log_zs + s_top * scale)
        tl.store(stats + 5, log_w + (1 - alpha) * s_top * scale + alpha * t_top * scale)
        if WANT_ESS:
            log_t, _, _ = _moments(teacher, student, width, t_top, s_top, scale, 2 - alpha, center, BLOCK)
            log_s, _, _ = _moments(teacher, student, width, t_top, s_top, scale, -alpha, center, BLOCK)
            tl.store(stats + 6, tl.exp(log_t - log_s - 2 * center))
        for start in range(0, width, BLOCK):
            t, s, dead = _pair(teacher, student, start, width, BLOCK)
            z = tl.where(alpha >= 0.5, t - (1 - alpha) * (t - s), s + alpha * (t - s))
            at = start + tl.arange(0, BLOCK)
            tl.store(out + at, tl.where(dead, -_INF, z), mask=at < width)


@triton.jit
def _root(
    teacher, student, width, t_top, s_top, scale, center, method, log_zs, log_zt, half_mean, half_variance,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Safeguarded Newton in [0, 1] from ½, where the function is known for KL symmetry; see `alpha._newton`."""
    low = 0.0
    high = 1.0
    alpha = 0.5
    last = 1.0
    value, slope = half_mean, half_variance
    step = 0
    while step < _STEPS:
        if method == _ESS_BALANCE:
            log_a, mean_a, _ = _moments(teacher, student, width, t_top, s_top, scale, -alpha, center, BLOCK)
            log_b, mean_b, _ = _moments(teacher, student, width, t_top, s_top, scale, 2 - alpha, center, BLOCK)
            value = log_a - log_b + 2 * center
            slope = mean_b - mean_a
        elif step > 0:
            _, value, slope = _moments(teacher, student, width, t_top, s_top, scale, alpha, center, BLOCK)
        step += 1
        if tl.abs(value) <= _TOLERANCE:
            step = _STEPS
        elif value == value:
            low = tl.where(value < 0.0, alpha, low)
            high = tl.where(value < 0.0, high, alpha)
            target = tl.where(slope > 0.0, alpha - value / slope, low)
            inside = (low < target) & (target < high) & (tl.abs(target - alpha) <= last / 2)
            target = tl.where(inside, target, (low + high) / 2)
            last = tl.abs(target - alpha)
            alpha = target
            if last <= _TOLERANCE:
                step = _STEPS
        else:  # NaN stays
            alpha = value
            step = _STEPS
    return alpha


@triton.jit
def _only_teacher(teacher, out, stats, width, scale, BLOCK: tl.constexpr):
    """A row without a common token is the teacher's."""
    tops = tl.full((BLOCK,), -_INF, tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(teacher + at, mask=at < width, other=-_INF).to(tl.float32)
        tl.store(out + at, z, mask=at < width)
        tops = tl.maximum(tops, z)
    top = tl.max(tops, 0)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
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
            params.method, params.alpha_min, params.alpha_max, params.fixed_alpha,
            teacher.stride(0), student.stride(0), out.stride(0), out.shape[1],
            STATISTICS=STATS, WANT_ESS=want_ess_ratio, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return stats
