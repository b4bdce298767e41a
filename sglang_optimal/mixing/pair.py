"""Two distributions over their common support, and the function A(α) that every alpha method solves for."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# log 0, but finite: 0·log 0 must be 0, not NaN.
_OUTSIDE = -1e30


@dataclasses.dataclass
class LogPair:
    """Student and teacher log-probabilities at one temperature, renormalised over the tokens that neither masks.

    Attributes:
        student: [B, V] float32, log p_s; ``_OUTSIDE`` outside the support.
        delta: [B, V] float32, log p_t − log p_s; 0 outside the support.
        student_log_z, teacher_log_z: [B] float32, the log normalisers of the scaled logits z/T over the support.
        empty: [B] bool, rows without a common token, whose other values mean nothing; None when nothing is masked.
        buffer: [B, V] float32 scratch, so that an evaluation allocates nothing.
    """

    student: Tensor
    delta: Tensor
    student_log_z: Tensor
    teacher_log_z: Tensor
    empty: Tensor | None
    buffer: Tensor

    @classmethod
    def from_logits(cls, teacher: Tensor, student: Tensor, temperature: Tensor) -> LogPair:
        """Normalise both models' logits over the tokens that neither masks.

        Args:
            teacher, student: [B, V] logits of any float dtype, on one device (cpu or cuda).
            temperature: [B, 1] float32, positive.
        """
        dead = empty = None
        t, t_top = _shifted(teacher, temperature, None)
        s, s_top = _shifted(student, temperature, None)
        # A sum is finite only if every term is: a cheap pass tells that nothing is masked. Looking at the answer would
        # stall a GPU, which therefore always takes the masked path.
        if t.is_cuda or not bool((t.sum() + s.sum()).isfinite()):
            dead = teacher.isneginf() | student.isneginf()
            empty = dead.all(-1)
            t, t_top = _shifted(teacher, temperature, dead)
            s, s_top = _shifted(student, temperature, dead)
        buffer = torch.empty_like(t)
        t_z = torch.exp(t, out=buffer).sum(-1).log_()
        s_z = torch.exp(s, out=buffer).sum(-1).log_()
        delta = t.sub_(s).sub_((t_z - s_z).unsqueeze(-1))
        s.sub_(s_z.unsqueeze(-1))
        if dead is not None:
            delta.masked_fill_(dead, 0.0)
        return cls(s, delta, s_z + s_top, t_z + t_top, empty, buffer)

    def select(self, rows: Tensor) -> LogPair:
        """Return the given rows only; rows: [n] int64."""
        empty = None if self.empty is None else self.empty[rows]
        return LogPair(
            self.student[rows],
            self.delta[rows],
            self.student_log_z[rows],
            self.teacher_log_z[rows],
            empty,
            self.buffer[: rows.numel()],
        )

    def weights(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return exp(log p_s + α·delta − c) [B, V], in the scratch buffer, and the shift c [B]. alpha: [B] float32."""
        x = torch.addcmul(self.student, alpha.unsqueeze(-1), self.delta, out=self.buffer)
        shift = x.amax(-1)
        return x.sub_(shift.unsqueeze(-1)).exp_(), shift

    def log_normalizer(self, alpha: Tensor) -> Tensor:
        """Return A(α) = log Σ p_s^(1−α) p_t^α, [B] float32. alpha: [B] float32."""
        w, shift = self.weights(alpha)
        return w.sum(-1).log_().add_(shift)

    def derivatives(self, alpha: Tensor, order: int = 2) -> tuple[Tensor, ...]:
        """Return (A, A', A'')(α) up to ``order``, each [B] float32. alpha: [B] float32.

        A' is the mean and A'' the variance of delta under q_α.
        """
        w, shift = self.weights(alpha)
        total = w.sum(-1)
        a = total.log().add_(shift)
        mean = w.mul_(self.delta).sum(-1).div_(total)
        if order == 1:
            return a, mean
        second = w.mul_(self.delta).sum(-1).div_(total)
        return a, mean, second.sub_(mean * mean).clamp_(min=0.0)


def _shifted(logits: Tensor, temperature: Tensor, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """(z − max z)/T [B, V], and max z/T [B]. Shifting before scaling keeps the digits of large logits."""
    z = logits.float()
    if dead is not None:
        z = z.masked_fill(dead, _OUTSIDE)
    top = z.amax(-1, keepdim=True)
    shifted = (z - top).div_(temperature)
    if dead is not None:
        shifted.masked_fill_(dead, _OUTSIDE)
    return shifted, (top / temperature).squeeze(-1)
