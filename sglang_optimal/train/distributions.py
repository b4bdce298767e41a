"""The student's and the target's log-probabilities as pairs of vectors, of the whole vocabulary or of k tokens and a
tail, in whose terms every divergence is written."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_optimal.train.checks import check_shape, scaled
from sglang_optimal.train.top_k import TopK

TAIL_RESOLUTION = 2.0**-24
"""Half the distance of float32 numbers below 1: a tail that was computed as 1 − Σ p cannot be told from 0 below it."""


def sampled_logprobs(student_logits: Tensor, token_ids: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return the student's log-probabilities of the tokens that were sampled.

    Args:
        student_logits: [..., V], any float dtype; those that predict ``token_ids``.
        token_ids: [...] integers in [0, V).
        temperature: positive; a number, [B], or one for each position.

    Returns:
        [...] float32 (float64 where the logits are), nats, differentiable.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if token_ids.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"token_ids: must be one for each position of student_logits, {list(student_logits.shape[:-1])}, "
            f"got {list(token_ids.shape)}."
        )
    logits = scaled(student_logits, temperature)
    # gather − logsumexp: log_softmax would hold one more tensor of the vocabulary for the backward pass.
    return logits.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def full_pair(student_logits: Tensor, target_logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return log p_s and the target's log p over the tokens that neither side masks.

    Args:
        student_logits, target_logits: [..., V].
        temperature: of both.

    Returns:
        Two of [..., V] float32 (float64 where the logits are); −inf outside the common support. A position without a
        common token is −inf throughout for both.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    check_logits(target_logits, student_logits)
    student, target = scaled(student_logits, temperature), scaled(target_logits, temperature)
    dead = student.isneginf() | target.isneginf()
    return _log_softmax(student, dead), _log_softmax(target, dead)


def check_logits(target_logits: Tensor, student_logits: Tensor) -> None:
    """Raise ValueError unless both have one shape."""
    if student_logits.shape != target_logits.shape:
        raise ValueError(
            f"target: logits of shape {list(target_logits.shape)} for student_logits of {list(student_logits.shape)}; "
            "where only the padding of the vocabularies differs, cut both to the common ids: logits[..., :V]."
        )


def check_top_k(target: TopK, student_logits: Tensor) -> None:
    """Raise ValueError unless the arrays are of the student's positions."""
    if target.tail.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"target: top-k arrays for the positions {list(target.tail.shape)}, student_logits for "
            f"{list(student_logits.shape[:-1])}."
        )
    if target.ids.shape[-1] > student_logits.shape[-1]:
        raise ValueError(
            f"target: {target.ids.shape[-1]} ids a position, but student_logits have {student_logits.shape[-1]} tokens."
        )


def lumped_pair(
    student_logits: Tensor, target: TopK, temperature: float | Tensor, *, tail_floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the log masses of student and target on the partition into k tokens and one event, the tail.

    The student's tail is the log-sum-exp of its logits outside the k ids, not 1 − Σ, of which float32 leaves nothing
    but rounding when the tail is small; its gradient is exact as well.

    Args:
        student_logits: [..., V].
        target: ids and masses, [..., k]. Ids whose log-probability is −inf are outside the common support, and leave
            the student's support too.
        temperature: of the student's logits; the target has it already.
        tail_floor: a smaller tail of the target is read as this, where the student has tokens in it.

    Returns:
        Two of [..., k + 1] float32 (float64 where the logits are). Where the student has no token outside the ids the
        tail has no tokens, and neither side has mass there.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    check_top_k(target, student_logits)
    logits, ids = scaled(student_logits, temperature), target.ids.long()
    rest = logits.scatter(-1, ids, -torch.inf)
    no_tail = rest.isneginf().all(-1, keepdim=True)
    # An empty sum has no gradient; a constant in its place keeps NaN out of it.
    tail = rest.masked_fill(no_tail, 0.0).logsumexp(-1, keepdim=True).masked_fill(no_tail, -torch.inf)
    lumped = torch.cat([logits.gather(-1, ids), tail], -1)
    log_masses = target.log_masses().to(lumped.dtype)
    if tail_floor > 0:
        log_masses = torch.cat([log_masses[..., :-1], log_masses[..., -1:].exp().clamp(min=tail_floor).log()], -1)
    log_masses = torch.cat([log_masses[..., :-1], log_masses[..., -1:].masked_fill(no_tail, -torch.inf)], -1)
    outside = torch.nn.functional.pad(target.logprobs.isneginf(), (0, 1), value=False)
    return _log_softmax(lumped, lumped.isneginf() | outside), log_masses


def pair(
    student_logits: Tensor, target: Tensor | TopK, temperature: float | Tensor, *, tail_floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return `lumped_pair` of a `TopK`, `full_pair` of logits."""
    if isinstance(target, TopK):
        return lumped_pair(student_logits, target, temperature, tail_floor=tail_floor)
    return full_pair(student_logits, target, temperature)


def mixture_logits(student_logits: Tensor, teacher_logits: Tensor, alpha: float | Tensor) -> Tensor:
    """Return logits of q* ∝ p_s^(1−α)·p_t^α, a fixed target: without gradient.

    The logits of q* at a temperature are these divided by it.

    Args:
        student_logits, teacher_logits: [..., V]. −inf on either side is −inf here.
        alpha: the teacher's weight; a number, or [...], such as the series ``alpha``.

    Returns:
        [..., V] float32 (float64 where the logits are).

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shape("teacher_logits", teacher_logits, student_logits, "student_logits")
    if isinstance(alpha, Tensor):
        if alpha.shape != student_logits.shape[:-1]:
            raise ValueError(
                f"alpha: must be a number or one for each position, {list(student_logits.shape[:-1])}, "
                f"got {list(alpha.shape)}."
            )
        alpha = alpha.unsqueeze(-1)
    with torch.no_grad():
        student, teacher = scaled(student_logits, 1.0), scaled(teacher_logits, 1.0)
        mixed = student + alpha * (teacher - student)
        return mixed.masked_fill(student.isneginf() | teacher.isneginf(), -torch.inf)


def _log_softmax(logits: Tensor, dead: Tensor) -> Tensor:
    """Over the entries that are not dead; −inf at those, and in rows that have no other."""
    empty = dead.all(-1, keepdim=True)
    return (
        logits.masked_fill(dead & ~empty, -torch.inf)
        .masked_fill(empty, 0.0)
        .log_softmax(-1)
        .masked_fill(dead, -torch.inf)
    )
