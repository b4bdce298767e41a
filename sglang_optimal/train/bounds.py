"""Between what bounds a divergence of the whole vocabulary lies when the target is known at k ids and by its tail."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from sglang_optimal.train.checks import check_beta, check_choice, scaled
from sglang_optimal.train.distributions import TAIL_RESOLUTION, lumped_pair
from sglang_optimal.train.losses import jsd, kl
from sglang_optimal.train.top_k import TopK

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """lower, upper: [...] float32 (float64 where the logits are), nats, without gradient; true to float precision.
    upper is +∞ where nothing bounds the divergence."""

    lower: Tensor
    upper: Tensor


@torch.no_grad()
def divergence_bounds(
    divergence: str,
    student_logits: Tensor,
    target: TopK,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    target_floor: float | Tensor | None = None,
) -> Bounds:
    """Bound the divergence of the whole vocabulary by what a `TopK` and the student's own logits tell.

    Of the tail the student's probabilities s_i are known one by one, of the target's only the sum p_τ, and, where the
    ids are its own top k, that none exceeds the least of the k, c. By the chain rule

        KL(p‖s) = KL of the partition + p_τ·KL(p's tail ‖ s's tail),

    each tail normalised. The last term is 0 where both tails have one shape, so the partition's value, which the losses
    return, is the largest lower bound. (By the data-processing inequality it is one for every f-divergence.)

    Upper bounds, with s_min the student's least probability in the tail:

    * ``forward_kl``: Σ_tail p_i log(p_i / s_i) ≤ p_τ·(log min(p_τ, c) − log s_min). Without c it is attained, by a
      target whose tail is all on the token that the student finds least likely.
    * ``reverse_kl``: none, unless p_τ's tokens have a floor: a single p_i → 0 makes it as large as one likes. With
      ``target_floor`` f ≤ log p_i it is Σ_tail s_i (log s_i − f).
    * ``jsd``: always finite. It is convex in the target's tail, so its largest value is at a vertex, again s_min's.

    Args:
        divergence: one of `DIVERGENCES`; KL(q*‖student) is ``forward_kl`` with the mixture's arrays.
        student_logits: [..., V].
        target: ids and masses at the same positions.
        beta: of ``jsd``, in [0, 1]; its ends are the two KLs, as in `generalised_jsd`.
        temperature: of the student's logits.
        target_floor: nats; for ``reverse_kl`` a lower bound of the target's log-probability of every token of the tail,
            a number or [...]. Top-k arrays do not tell it.

    Returns:
        Bounds of one value a position. Where the ids are the whole support, both are the divergence itself.

    Raises:
        ValueError: an unknown divergence, β outside [0, 1], shapes that do not fit.

    Example:
        >>> teacher = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])
        >>> student = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.0])
        >>> bounds = divergence_bounds("forward_kl", student, TopK.from_logits(teacher, 3))
        >>> truth = forward_kl(student[None], teacher[None])
        >>> bool(bounds.lower < truth < bounds.upper)
        True
    """
    check_choice("divergence", divergence, DIVERGENCES)
    check_beta(beta)
    if divergence == "jsd" and beta in (0, 1):
        divergence = "forward_kl" if beta == 0 else "reverse_kl"
    floor = TAIL_RESOLUTION if divergence == "reverse_kl" else 0.0
    log_s, log_p = lumped_pair(student_logits, target, temperature, tail_floor=floor)
    # The k tokens' share alone, and what the tail can add at most.
    s_k, p_k = log_s[..., :-1], log_p[..., :-1]
    tail_s, tail_p = log_s[..., -1], log_p[..., -1]
    tokens = _log_tail_tokens(student_logits, target, temperature, log_s)
    if divergence == "forward_kl":
        lower, known = kl(log_p, log_s), kl(p_k, s_k)
        largest = torch.minimum(tail_p, p_k.min(-1).values) if target.own else tail_p
        tail = tail_p.exp() * (largest - tokens.masked_fill(tokens.isneginf(), math.inf).min(-1).values)
        tail = tail.masked_fill(tail_p.isneginf(), 0.0)
    elif divergence == "reverse_kl":
        lower, known = kl(log_s, log_p), kl(s_k, p_k)
        if target_floor is None:
            tail = torch.full_like(lower, math.inf)
        else:
            f = torch.as_tensor(target_floor, dtype=lower.dtype, device=lower.device)
            tail = kl(tokens, f.expand(lower.shape).unsqueeze(-1).expand(tokens.shape))
        tail = tail.masked_fill(tail_s.isneginf(), 0.0)
    else:
        lower, known = jsd(log_p, log_s, beta), jsd(p_k, s_k, beta)
        least = tokens.masked_fill(tokens.isneginf(), math.inf).min(-1, keepdim=True).values
        no_tail = least.isposinf().squeeze(-1)
        least = least.masked_fill(least.isposinf(), -math.inf)
        vertex = jsd(tail_p.unsqueeze(-1), least, beta)
        tail = vertex + (1 - beta) * (tail_s.exp() - least.squeeze(-1).exp()) * -math.log1p(-beta)
        tail = tail.masked_fill(no_tail, 0.0)
    nothing = log_s.isneginf().all(-1)
    # Rounding must not put the bounds the wrong way round, nor apart where there is no tail.
    upper = torch.maximum(torch.where(tail_s.isneginf(), lower, known + tail), lower)
    return Bounds(lower.masked_fill(nothing, math.inf), upper.masked_fill(nothing, math.inf))


def _log_tail_tokens(student_logits: Tensor, target: TopK, temperature: float | Tensor, log_s: Tensor) -> Tensor:
    """[..., V] log p_s of the tail's tokens over the common support; −inf for the k ids and what the student masks."""
    rest = scaled(student_logits, temperature).scatter(-1, target.ids.long(), -torch.inf)
    nothing = rest.isneginf().all(-1, keepdim=True)
    shape = rest.masked_fill(nothing, 0.0).log_softmax(-1).masked_fill(nothing, -torch.inf)
    return shape + log_s[..., -1:]
