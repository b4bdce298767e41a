"""Importance weights: samples of q*, read as samples of the student or the teacher."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sglang_optimal.train.checks import check_choice, check_finite, check_shape
from sglang_optimal.train.reduction import reduce

LEVELS = ("token", "sequence")


@dataclasses.dataclass(frozen=True)
class ImportanceWeights:
    """Weights of a batch, without gradient.

    Attributes:
        weights: [B, L] float32; 0 where masked. With ``sequence`` a sequence's tokens all have its weight.
        ess: scalar, the effective sample size (Σw)²/Σw² of these weights, in tokens or sequences.
        ess_ratio: scalar in (0, 1], ess over their number.
        clipped: scalar in [0, 1], the share of weights that ``max_weight`` cut.
    """

    weights: Tensor
    ess: Tensor
    ess_ratio: Tensor
    clipped: Tensor


@torch.no_grad()
def importance_weights(
    target_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    level: str = "token",
    max_weight: float | None = None,
    normalise: bool = True,
) -> ImportanceWeights:
    """Weights p/b of tokens that were drawn with probability b, towards the distribution p.

    Per token, w = p(y_t)/b(y_t): for the prefixes as they were sampled, E_b[w·f(y_t)] = E_p[f(y_t)]. Per sequence,
    w = Π p(y_t)/b(y_t): unbiased for the whole text, with a variance that grows with its length.

    Args:
        target_logprobs: [B, L], nats, log p of the sampled tokens: the series ``student_logprob`` or
            ``teacher_logprob``, or the present student's.
        behaviour_logprobs: [B, L], the log-probability with which each was really drawn: ``behaviour_logprob``, or
            ``mixture_logprob`` where nothing (top-p, top-k, min-p) cut q*.
        mask: [B, L] bool or 0/1, True at the completion's tokens; None: all.
        level: ``token`` or ``sequence``.
        max_weight: cut larger weights down to it (truncated importance sampling: less variance, some bias), before they
            are normalised; None: do not.
        normalise: divide by the weights' mean, so that it is 1 (self-normalised importance sampling: biased by O(1/n),
            free of the scale). The mean is of this batch: of a batch of one sequence nothing is left per sequence.

    Returns:
        ImportanceWeights.

    Raises:
        ValueError: shapes that do not fit, an unknown level, max_weight ≤ 0, a token that was drawn with probability 0.

    Example:
        >>> student, mixture = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> found = importance_weights(student, mixture, normalise=False)
        >>> found.weights, found.ess
        (tensor([[1.0000, 0.3679]]), tensor(1.6481))
    """
    check_choice("level", level, LEVELS)
    check_shape("behaviour_logprobs", behaviour_logprobs, target_logprobs, "target_logprobs")
    if target_logprobs.ndim != 2:
        raise ValueError(f"target_logprobs: must be [B, L], got {list(target_logprobs.shape)}.")
    if max_weight is not None and not max_weight > 0:
        raise ValueError(f"max_weight: must be positive, got {max_weight}.")
    if mask is None:
        mask = torch.ones_like(target_logprobs, dtype=torch.bool)
    check_shape("mask", mask, target_logprobs, "target_logprobs")
    mask = mask.bool()
    check_finite("behaviour_logprobs", behaviour_logprobs, mask, "a token that was drawn has a probability; mask it")
    # float64: a sequence's log weight may be in the hundreds.
    log_weights = torch.where(mask, target_logprobs.double() - behaviour_logprobs.double(), 0.0)
    counted = mask
    if level == "sequence":
        log_weights, counted = log_weights.sum(-1, keepdim=True), mask.any(-1, keepdim=True)
    weights = torch.where(counted, log_weights.exp(), 0.0)
    number = counted.sum().clamp(min=1)
    clipped = torch.zeros((), dtype=torch.float64, device=weights.device)
    if max_weight is not None:
        clipped = ((weights > max_weight) & counted).sum() / number
        weights = weights.clamp(max=max_weight)
    total = weights.sum()
    # Scaled before it is squared.
    shares = weights / total.clamp(min=torch.finfo(torch.float64).tiny)
    squares = (shares**2).sum()
    ess = torch.where(squares > 0, 1 / squares.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    if normalise:
        weights = shares * number
    weights = torch.where(mask, weights.expand(mask.shape), 0.0)
    return ImportanceWeights(weights.float(), ess.float(), (ess / number).float(), clipped.float())


def weighted_nll(
    student_logprobs: Tensor, weights: Tensor, mask: Tensor | None = None, *, reduction: str = "token"
) -> Tensor:
    """−w·log p_s of the sampled tokens: supervised fine-tuning on reweighted samples.

    With weights p_t/q* the expectation of its gradient, over a token drawn from q*, is that of KL(teacher‖student).
    With p_s/q* of the student that sampled it is fine-tuning on that student's own samples, as rejection sampling does
    where the filters decide which are left.

    Args:
        student_logprobs: [B, L], differentiable, see `sampled_logprobs`.
        weights: [B, L], such as those of `importance_weights`.
        mask: [B, L] bool or 0/1; None: all.
        reduction: one of `REDUCTIONS`.

    Returns:
        Nats: a scalar, or [B, L] with ``none``.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction.
    """
    check_shape("weights", weights, student_logprobs, "student_logprobs")
    if mask is not None:
        check_shape("mask", mask, student_logprobs, "student_logprobs")
        student_logprobs = student_logprobs.masked_fill(~mask.bool(), 0.0)
    return reduce(-weights.detach() * student_logprobs, mask, reduction)
