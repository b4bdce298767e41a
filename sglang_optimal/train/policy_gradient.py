"""On-policy distillation by policy gradient, from tokens that another distribution drew."""

from __future__ import annotations

from torch import Tensor

from sglang_optimal.train.checks import check_finite, check_shape
from sglang_optimal.train.reduction import reduce


def policy_gradient_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    max_ratio: float | None = None,
    reduction: str = "token",
) -> Tensor:
    """The reverse KL of each token, estimated from one token that was drawn from b, and its gradient.

    With the advantage A = log p_t(y) − log p_s(y) of the token alone (nothing of what follows, as in Thinking Machines'
    "On-Policy Distillation", 2025, and the single-step part of MiniLLM, arXiv 2306.08543) and the ratio ρ = p_s(y)/b(y)
    of the present student to the distribution that drew y,

        value = −ρ·A,     gradient = −ρ·A·∇ log p_s(y).

    Over y drawn from b, such as q*, the expectations are KL(p_s‖p_t) at this prefix and its gradient, exactly, as long
    as b is nowhere 0 where p_s is not. Prefixes are those that b drew and are not reweighted: MiniLLM too, which
    samples from a mixture with its teacher, takes the last token's ratio for the product. ``max_ratio`` cuts ρ
    (truncated importance sampling, Ionides 2008): less variance, some bias.

    Args:
        student_logprobs: [B, L], nats, of the present student, differentiable, see `sampled_logprobs`.
        teacher_logprobs: [B, L], the series ``teacher_logprob``.
        behaviour_logprobs: [B, L], the log-probability with which each token was really drawn: ``behaviour_logprob``,
            or ``mixture_logprob`` where nothing (top-p, top-k, min-p) cut q*.
        mask: [B, L] bool or 0/1, True at the completion's tokens; None: all.
        max_ratio: the largest ρ; None: as it is.
        reduction: one of `REDUCTIONS`.

    Returns:
        Nats: a scalar, or [B, L] with ``none``. A single token's value may be negative.

    Raises:
        ValueError: shapes that do not fit, max_ratio ≤ 0, a token without probability under teacher or behaviour.

    Example:
        >>> student = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        >>> loss = policy_gradient_loss(student, torch.tensor([[-1.5, -0.5]]), torch.tensor([[-1.0, -1.0]]))
        >>> loss.backward()
        >>> loss.detach(), student.grad
        (tensor(-0.0259), tensor([[ 0.2500, -0.2759]]))
    """
    check_shape("teacher_logprobs", teacher_logprobs, student_logprobs, "student_logprobs")
    check_shape("behaviour_logprobs", behaviour_logprobs, student_logprobs, "student_logprobs")
    if max_ratio is not None and not max_ratio > 0:
        raise ValueError(f"max_ratio: must be positive, got {max_ratio}.")
    if mask is not None:
        check_shape("mask", mask, student_logprobs, "student_logprobs")
        kept = mask.bool()
        student_logprobs = student_logprobs.masked_fill(~kept, 0.0)
        teacher_logprobs = teacher_logprobs.masked_fill(~kept, 0.0)
        behaviour_logprobs = behaviour_logprobs.masked_fill(~kept, 0.0)
    for name, values in (("teacher_logprobs", teacher_logprobs), ("behaviour_logprobs", behaviour_logprobs)):
        check_finite(name, values, mask, "mask tokens without a probability")
    student = student_logprobs.detach()
    ratio = (student - behaviour_logprobs.detach()).exp()
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    cost = ratio * (student - teacher_logprobs.detach())
    # The value is the estimate; the gradient that of cost·log p_s.
    return reduce(cost + cost * (student_logprobs - student), mask, reduction)
