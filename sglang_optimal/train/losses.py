"""Divergences between the student and a target, differentiable in the student's logits.

The target is the other side's logits over the whole vocabulary, or a `TopK`. With a `TopK` the divergence is of the
partition into k tokens and one event, the tail, and by the data-processing inequality a lower bound of that of the
whole vocabulary, with equality where k reaches the support; `divergence_bounds` says how far it may be off.

All is computed in float32 (float64 where the logits are), over the common support: a token that either side masks
(−inf) is left out of both, as in the engine's mixing. A position without a common token has an infinite divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sglang_optimal.train.checks import at_positions, check_beta, check_choice, check_shape
from sglang_optimal.train.distributions import TAIL_RESOLUTION, check_logits, check_top_k, pair
from sglang_optimal.train.reduction import REDUCTIONS, reduce
from sglang_optimal.train.top_k import TopK


def forward_kl(
    student_logits: Tensor,
    target: Tensor | TopK,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: str = "token",
) -> Tensor:
    """KL(target‖student), such as KL(teacher‖student): covers the target's modes.

    Args:
        student_logits: [B, L, V], any float dtype; those that predict the completion's tokens.
        target: logits [B, L, V], or a `TopK` of [B, L, k]; gets no gradient where it has none.
        temperature: positive; a number, [B] or [B, L]. A `TopK` has it already.
        mask: [B, L] bool or 0/1, True at the completion's tokens; None: all.
        reduction: one of `REDUCTIONS`, see `reduce`.

    Returns:
        Nats a token: a scalar, or [B, L] with ``none``.

    Raises:
        ValueError: names the argument: shapes that do not fit, a temperature that is not positive, no such reduction.

    Example:
        >>> teacher = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
        >>> student = torch.zeros(1, 1, 4)
        >>> forward_kl(student, teacher)
        tensor(0.4388)
        >>> forward_kl(student, TopK.from_logits(teacher, 2))
        tensor(0.4255)
    """
    return _reduced(lambda log_p, log_s: kl(log_p, log_s), student_logits, target, temperature, mask, reduction)


def reverse_kl(
    student_logits: Tensor,
    target: Tensor | TopK,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: str = "token",
) -> Tensor:
    """KL(student‖target): seeks the target's modes; the objective of MiniLLM (arXiv 2306.08543).

    Infinite where the student has mass and the target none. Masked tokens are outside the common support, and left out;
    a `TopK`'s tail below `TAIL_RESOLUTION` is read as that, because a float32 1 − Σ p cannot tell it from 0. It makes
    the value smaller (down to −2⁻²⁴ for equal distributions), so that it stays a lower bound.

    Args and errors: as `forward_kl`.

    Example:
        >>> teacher = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
        >>> student = torch.zeros(1, 1, 4)
        >>> reverse_kl(student, teacher)
        tensor(0.5539)
    """
    return _reduced(
        lambda log_p, log_s: kl(log_s, log_p), student_logits, target, temperature, mask, reduction, TAIL_RESOLUTION
    )


def generalised_jsd(
    student_logits: Tensor,
    target: Tensor | TopK,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: str = "token",
) -> Tensor:
    """The generalised Jensen–Shannon divergence of GKD (arXiv 2306.13649, eq. 1), with m = β·target + (1−β)·student:

        β·KL(target‖m) + (1−β)·KL(student‖m)

    By that formula it would be 0 at both ends. As in TRL's GKDTrainer, β = 0 is `forward_kl` and β = 1 `reverse_kl`,
    the limits of JSD/β and JSD/(1−β); its scale therefore jumps there. In between it is finite whatever is masked.

    Args and errors: as `forward_kl`, and

        beta: in [0, 1].

    Example:
        >>> teacher = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
        >>> student = torch.zeros(1, 1, 4)
        >>> generalised_jsd(student, teacher, beta=0.5)
        tensor(0.1133)
    """
    check_beta(beta)
    if beta == 0:
        return forward_kl(student_logits, target, temperature=temperature, mask=mask, reduction=reduction)
    if beta == 1:
        return reverse_kl(student_logits, target, temperature=temperature, mask=mask, reduction=reduction)
    return _reduced(lambda log_p, log_s: jsd(log_p, log_s, beta), student_logits, target, temperature, mask, reduction)


def mixture_kl(
    student_logits: Tensor,
    mixture: Tensor | TopK,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: str = "token",
) -> Tensor:
    """KL(q*‖student), of which the series ``kl_to_student`` is the value at the time of sampling.

    q* is fixed: the student is drawn towards the distribution that its tokens came from, which lies between it and the
    teacher. With q* of the present student (`mixture_logits`) the gradient in the student's logits is p_s − q*.

    Args and errors: as `forward_kl`, and

        mixture: logits of q* [B, L, V], see `mixture_logits`, or a `TopK` of ``top_k_X_mixture_logprobs`` and its tail.
    """
    return forward_kl(student_logits, mixture, temperature=temperature, mask=mask, reduction=reduction)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p·(log p − log q) of [..., n] log masses; a term without p is 0, and one without q alone is infinite."""
    absent = log_p.isneginf()
    difference = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    return (log_p.exp() * difference).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q, of [..., n] log masses; β in (0, 1)."""
    absent = log_p.isneginf() & log_q.isneginf()
    p, q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    log_m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta)).masked_fill(absent, -torch.inf)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _reduced(
    divergence: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    target: Tensor | TopK,
    temperature: float | Tensor,
    mask: Tensor | None,
    reduction: str,
    tail_floor: float = 0.0,
) -> Tensor:
    """``divergence`` of (log p, log p_s) at the positions that are not masked, which alone are computed."""
    check_choice("reduction", reduction, REDUCTIONS)
    if mask is not None:
        check_shape("mask", mask, student_logits[..., 0], "the positions of student_logits")
        mask = mask.bool()
        if isinstance(temperature, Tensor):
            temperature = at_positions(temperature, student_logits)[mask]
        if isinstance(target, TopK):
            check_top_k(target, student_logits)
            target = TopK(target.ids[mask], target.logprobs[mask], target.tail[mask])
        else:
            check_logits(target, student_logits)
            target = target[mask]
        student_logits = student_logits[mask]
    log_s, log_p = pair(student_logits, target, temperature, tail_floor=tail_floor)
    values = divergence(log_p, log_s).masked_fill(log_s.isneginf().all(-1), math.inf)
    if mask is not None:
        values = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return reduce(values, mask, reduction)
