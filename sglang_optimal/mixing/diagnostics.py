"""How far apart the two models are at a position, and how the mixture stands between them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sglang_optimal.mixing.alpha import entropies, kl_symmetry
from sglang_optimal.mixing.mixture import Mixture
from sglang_optimal.mixing.pair import LogPair


@dataclasses.dataclass
class Diagnostics:
    """Per row, [B] float32 each, in nats where a unit applies.

    Attributes:
        kl_to_student, kl_to_teacher: KL(q*‖p_s), KL(q*‖p_t).
        ess_ratio: the student's effective sample size over the teacher's; 1 is balance.
        entropy_student, entropy_teacher, entropy_mixture: of p_s, p_t and q*.
        chernoff_information: −min A over [0, 1], a measure of disagreement that does not depend on alpha
            (Chernoff 1952); 0 for equal models.
    """

    kl_to_student: Tensor
    kl_to_teacher: Tensor
    ess_ratio: Tensor
    entropy_student: Tensor
    entropy_teacher: Tensor
    entropy_mixture: Tensor
    chernoff_information: Tensor


def diagnose(mixture: Mixture, teacher_logits: Tensor, student_logits: Tensor, temperature: Tensor) -> Diagnostics:
    """Everything worth knowing about a mixture that ``mix`` has made from the same arguments.

    Args:
        mixture: of ``teacher_logits`` and ``student_logits``, [B, V]. temperature: [B] or [B, 1].
    """
    pair = LogPair.from_logits(teacher_logits, student_logits, temperature.reshape(-1, 1).float())
    student, teacher = entropies(pair)
    log_q = torch.log_softmax(mixture.logits / temperature.reshape(-1, 1).float(), dim=-1)
    ess_ratio = (pair.log_normalizer(2.0 - mixture.alpha) - pair.log_normalizer(-mixture.alpha)).exp_()
    point, _ = kl_symmetry(pair)
    return Diagnostics(
        kl_to_student=mixture.kl_to_student,
        kl_to_teacher=mixture.kl_to_teacher,
        ess_ratio=ess_ratio,
        entropy_student=student,
        entropy_teacher=teacher,
        entropy_mixture=torch.special.entr(log_q.exp()).sum(-1),
        chernoff_information=(-pair.log_normalizer(point)).clamp(min=0.0),
    )
