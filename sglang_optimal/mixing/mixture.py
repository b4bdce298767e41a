"""The mixture q* ∝ p_s^(1−α) p_t^α, batched, with an alpha method per row."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sglang_optimal.mixing.alpha import AlphaParams, solve_alpha
from sglang_optimal.mixing.pair import LogPair

IMPLEMENTATIONS = ("torch", "numba", "triton")

# Rows are worked on in blocks of at most this many elements, which keeps the working set in a CPU's last-level cache.
_BLOCK_ELEMENTS = 1 << 20


@dataclasses.dataclass
class Mixture:
    """The result of `mix` for B rows, all float32, on the device of the logits.

    p_t and p_s are the models' distributions at the row's temperature T, over their common support.

    Attributes:
        logits: [B, V], (1−α)·z_s + α·z_t, which is T·log q* up to a constant; −inf where either model masks.
        alpha: [B], the teacher's weight.
        kl_to_student, kl_to_teacher: [B] nats, KL(q*‖p_s) and KL(q*‖p_t); +inf without a common token.
        teacher_log_z, student_log_z, mixture_log_z: [B], log Σ exp(z/T) over the support.
        ess_ratio: [B], the student's effective sample size over the teacher's, Σ p_t²/q* / Σ p_s²/q*; 1 is balance.
            None unless ``mix`` was called with ``ess_ratio=True``.
    """

    logits: Tensor
    alpha: Tensor
    kl_to_student: Tensor
    kl_to_teacher: Tensor
    teacher_log_z: Tensor
    student_log_z: Tensor
    mixture_log_z: Tensor
    ess_ratio: Tensor | None = None


def mix(
    teacher_logits: Tensor,
    student_logits: Tensor,
    temperature: Tensor,
    params: AlphaParams,
    *,
    ess_ratio: bool = False,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Mixture:
    """Solve alpha for every row and form the mixture q* ∝ p_s^(1−α) p_t^α.

    A token that either model masks (−inf) is outside the support of both before alpha is solved. A row without any
    common token is the teacher's, with alpha 1. NaN stays in its row. On a GPU nothing waits for the device.

    Args:
        teacher_logits, student_logits: [B, V], any float dtype, on one device (cpu or cuda), and not modified;
            penalties and masks already applied.
        temperature: [B] or [B, 1], positive, on the same device.
        params: the rows' alpha settings, on the same device.
        ess_ratio: whether to compute ``Mixture.ess_ratio`` (two more passes over the vocabulary).
        out: [B, V] float32 to write ``Mixture.logits`` into; must not share memory with the arguments. None: new
            memory.
        implementation: one of `IMPLEMENTATIONS`. None: the fused one of the device (``numba`` on a CPU, ``triton`` on a
            GPU), else ``torch``, plain PyTorch on any device. All agree to float32 precision.

    Returns:
        The mixture's logits [B, V], alpha [B] and what follows from both. ``(logits / T).softmax(-1)`` is q*.

    Raises:
        ValueError: shapes that do not fit, ``out`` of another dtype or (fused implementations) not contiguous in its
            last dimension, or an implementation that the device cannot run.

    Example:
        >>> import torch
        >>> from sglang_optimal.mixing import AlphaParams, mix
        >>> teacher = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> student = torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> mixture = mix(teacher, student, torch.ones(1), AlphaParams.uniform(1))
        >>> round(mixture.alpha.item(), 4)  # neither is nearer to q*
        0.5
        >>> torch.allclose(mixture.kl_to_student, mixture.kl_to_teacher, atol=1e-5)
        True
        >>> [round(p, 3) for p in mixture.logits.softmax(-1)[0].tolist()]
        [0.363, 0.274, 0.363]
    """
    if teacher_logits.shape != student_logits.shape or teacher_logits.dim() != 2:
        raise ValueError(
            f"teacher_logits, student_logits: must both be [B, V], got {list(teacher_logits.shape)} and "
            f"{list(student_logits.shape)}."
        )
    size, width = teacher_logits.shape
    if temperature.numel() != size or params.method.numel() != size:
        raise ValueError(f"temperature, params: must have one entry for each of the {size} rows.")
    temperature = temperature.reshape(size, 1).float()
    logits = torch.empty((size, width), dtype=torch.float32, device=teacher_logits.device) if out is None else out
    if logits.shape != teacher_logits.shape or logits.dtype != torch.float32:
        raise ValueError(f"out: must be float32 {[size, width]}, got {logits.dtype} {list(logits.shape)}.")
    fused = _fused(implementation, teacher_logits.device)
    if fused is not None:
        stats = fused(teacher_logits, student_logits, temperature, params, ess_ratio, logits)
        alpha, kl_s, kl_t, teacher_z, student_z, mixture_z, ess = stats.unbind(-1)
        return Mixture(logits, alpha, kl_s, kl_t, teacher_z, student_z, mixture_z, ess if ess_ratio else None)
    block = max(size, 1) if teacher_logits.is_cuda else max(1, _BLOCK_ELEMENTS // max(width, 1))
    parts = [
        _mix_block(teacher_logits[r], student_logits[r], temperature[r], params.rows(r), ess_ratio, logits[r])
        for r in (slice(i, i + block) for i in range(0, max(size, 1), block))
    ]
    if len(parts) == 1:
        return parts[0]
    rest = [field.name for field in dataclasses.fields(Mixture) if field.name != "logits"]
    columns: dict[str, Any] = {name: [getattr(part, name) for part in parts] for name in rest}
    columns = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    return Mixture(logits, **columns)


def compile_kernels(device: torch.device | str, width: int = 16) -> None:
    """Compile the kernels of `mix` for a device now, so that no request waits for it (seconds).

    Args:
        device: cpu or cuda.
        width: V, the width of the rows of logits; Triton compiles multiples of 16 and other widths apart.
    """
    logits = torch.zeros((1, width), device=device)
    for ess_ratio in (False, True):
        mix(logits, logits, logits[:, :1] + 1.0, AlphaParams.uniform(1, device=device), ess_ratio=ess_ratio)


def _fused(name: str | None, device: torch.device) -> Callable[..., Tensor] | None:
    """Return the function that mixes rows into ``out`` and returns their statistics [B, 7]; None: plain PyTorch."""
    if name is None:
        name = {"cpu": "numba", "cuda": "triton"}.get(device.type, "torch")
        if name == "triton" and importlib.util.find_spec("triton") is None:
            name = "torch"
    if name == "torch":
        return None
    if name == "numba" and device.type == "cpu":
        from sglang_optimal.mixing.fused_cpu import mix_rows

        return mix_rows
    if name == "triton" and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        from sglang_optimal.mixing.fused_gpu import mix_rows

        return mix_rows
    raise ValueError(f"implementation: {name!r} cannot run on {device.type}; choose from {', '.join(IMPLEMENTATIONS)}.")


def _mix_block(
    teacher: Tensor, student: Tensor, temperature: Tensor, params: AlphaParams, want_ess_ratio: bool, out: Tensor
) -> Mixture:
    pair = LogPair.from_logits(teacher, student, temperature)
    alpha = solve_alpha(pair, params)
    a, slope = pair.derivatives(alpha, order=1)
    kl_to_student = (alpha * slope - a).clamp_(min=0.0)
    kl_to_teacher = ((alpha - 1.0) * slope - a).clamp_(min=0.0)
    mixture_log_z = a + (1.0 - alpha) * pair.student_log_z + alpha * pair.teacher_log_z
    ess_ratio = None
    if want_ess_ratio:
        ess_ratio = (pair.log_normalizer(2.0 - alpha) - pair.log_normalizer(-alpha)).exp_()
    _interpolate(teacher, student, alpha, pair, out)
    if pair.empty is not None:
        kl_to_student = kl_to_student.masked_fill(pair.empty, torch.inf)
        kl_to_teacher = kl_to_teacher.masked_fill(pair.empty, torch.inf)
        own = (teacher.float() / temperature).logsumexp(-1)
        mixture_log_z = torch.where(pair.empty, own, mixture_log_z)
        if ess_ratio is not None:
            ess_ratio = ess_ratio.masked_fill(pair.empty, torch.nan)
    return Mixture(
        out, alpha, kl_to_student, kl_to_teacher, pair.teacher_log_z, pair.student_log_z, mixture_log_z, ess_ratio
    )


def _interpolate(teacher: Tensor, student: Tensor, alpha: Tensor, pair: LogPair, out: Tensor) -> None:
    """(1−α)·z_s + α·z_t into ``out`` [B, V] float32."""
    t, s = teacher.float(), student.float()
    torch.lerp(s, t, alpha.unsqueeze(-1), out=out)
    if pair.empty is not None:
        # −inf·0 is NaN, and a weight outside [0, 1] turns −inf into +inf: what is masked stays masked.
        out.masked_fill_(t.isneginf() | s.isneginf(), -torch.inf)
        torch.where(pair.empty.unsqueeze(-1), t, out, out=out)


def token_logprobs(
    mixture: Mixture, teacher_logits: Tensor, student_logits: Tensor, temperature: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability of one token a row under each model and the mixture, at the row's temperature.

    Args:
        mixture: the result of `mix` for the same logits. Its ``logits`` are not read: sampling may have overwritten
            them.
        teacher_logits, student_logits: [B, V], any float dtype, on the mixture's device (cpu or cuda).
        temperature: [B] or [B, 1].
        token_ids: [B] int64, tokens that neither model masks.

    Returns:
        (teacher, student, mixture), each [B] float32, in nats.

    Raises:
        RuntimeError: PyTorch's, for shapes or devices that do not fit, or a token id outside the vocabulary.
    """
    index = token_ids.reshape(-1, 1)
    temperature = temperature.reshape(-1).float()
    teacher, student = (
        logits.gather(-1, index).squeeze(-1).float() / temperature for logits in (teacher_logits, student_logits)
    )
    # With alpha 1 the student's may be −inf: a row that has no common token is the teacher's.
    mixed = torch.where(mixture.alpha == 1.0, teacher, torch.lerp(student, teacher, mixture.alpha))
    return teacher - mixture.teacher_log_z, student - mixture.student_log_z, mixed - mixture.mixture_log_z
