"""What can be said of one token of each row beyond the mixture: more series, and the most likely tokens of a side.

All distributions are those at the row's temperature, over the tokens that neither model masks. Plain PyTorch on any
device, and on a GPU nothing waits for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sglang_optimal.mixing.mixture import Mixture

# Rows are worked on in blocks of at most this many elements, which keeps the working set in a CPU's cache, and the
# temporaries on a GPU small.
_BLOCK_ELEMENTS = 1 << 19
_BLOCK_ELEMENTS_DEVICE = 1 << 24


@dataclasses.dataclass
class Sides:
    """Both models and their mixture, of B rows.

    Attributes:
        mixture: the result of `mix` for the logits. Its ``logits`` are not read: sampling may have overwritten them.
        teacher_logits, student_logits: [B, V], any float dtype, on one device (cpu or cuda).
        temperature: [B] or [B, 1], positive.
    """

    mixture: Mixture
    teacher_logits: Tensor
    student_logits: Tensor
    temperature: Tensor

    def __post_init__(self) -> None:
        self._temperature = self.temperature.reshape(-1, 1).float()

    def mixture_logits(self) -> Tensor:
        """The mixture's logits [B, V] float32, anew; −inf where either model masks."""
        return _mixed(self.teacher_logits.float(), self.student_logits.float(), self.mixture.alpha.unsqueeze(-1))

    def logprobs(self, token_ids: Tensor) -> Tensor:
        """Log-probabilities of any tokens under the teacher, the student and the mixture.

        Args:
            token_ids: [B, n] int64.

        Returns:
            [B, 3, n] float32, nats; −inf for a token that either model masks.
        """
        m = self.mixture
        both = (self.teacher_logits, self.student_logits)
        teacher, student = (logits.gather(-1, token_ids).float() / self._temperature for logits in both)
        mixed = _mixed(teacher, student, m.alpha.unsqueeze(-1))
        logprobs = torch.stack([teacher, student, mixed], dim=1)
        logprobs -= torch.stack([m.teacher_log_z, m.student_log_z, m.mixture_log_z], dim=1).unsqueeze(-1)
        return logprobs.masked_fill_(mixed.isneginf().unsqueeze(1), -torch.inf)

    def blocks(self) -> Iterator[Sides]:
        """The same, some rows at a time."""
        size, width = self.teacher_logits.shape
        elements = _BLOCK_ELEMENTS_DEVICE if self.teacher_logits.is_cuda else _BLOCK_ELEMENTS
        rows = max(1, elements // max(width, 1))
        m = self.mixture
        for i in range(0, size, rows):
            r = slice(i, i + rows)
            part = dataclasses.replace(
                m,
                alpha=m.alpha[r],
                teacher_log_z=m.teacher_log_z[r],
                student_log_z=m.student_log_z[r],
                mixture_log_z=m.mixture_log_z[r],
            )
            yield Sides(part, self.teacher_logits[r], self.student_logits[r], self._temperature[r])


def more_series(names: Sequence[str], sides: Sides, token_ids: Tensor) -> Tensor:
    """Series of one token of each row that `mix` does not give.

    Args:
        names: of ``teacher_entropy``, ``student_entropy``, ``mixture_entropy`` (nats), ``kl_student_teacher``,
            ``kl_teacher_student`` (KL(student‖teacher) and KL(teacher‖student), nats), ``ess_student``, ``ess_teacher``
            (1/Σ p²/q: the effective sample size of importance sampling from q for each model, a sample, in (0, 1]; Kong
            1992), ``teacher_rank``, ``student_rank`` (1 for the most likely token; equals share the best rank).
        sides: B rows.
        token_ids: [B] int64, the tokens.

    Returns:
        [B, len(names)] float32.

    Raises:
        KeyError: another name.

    Example:
        >>> import torch
        >>> from sglang_optimal.mixing import AlphaParams, Sides, mix, more_series
        >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> temperature = torch.ones(1)
        >>> sides = Sides(mix(teacher, student, temperature, AlphaParams.uniform(1)), teacher, student, temperature)
        >>> values = more_series(["teacher_rank", "student_rank", "student_entropy"], sides, torch.tensor([0]))
        >>> [round(v, 3) for v in values[0].tolist()]
        [1.0, 3.0, 0.802]
    """
    functions = [_SERIES[name] for name in names]
    if not functions:
        return sides.mixture.alpha.new_empty((len(token_ids), 0))
    done, start = [], 0
    for block in sides.blocks():
        row = _Row(block, token_ids[start : start + len(block.teacher_logits)])
        start += len(block.teacher_logits)
        done.append(torch.stack([function(row) for function in functions], dim=-1))
    return torch.cat(done)


def top_k(side: str, k: int, sides: Sides) -> Tensor:
    """The k most likely tokens of a side, and what all three distributions give to each.

    Args:
        side: ``teacher``, ``student`` or ``mixture``.
        k: at least 1; may be more than the tokens there are.
        sides: B rows.

    Returns:
        [B, 4, k] float32: token ids (exact: below 2²⁴), and the log-probabilities under the teacher, the student and
        the mixture (nats), the side's most likely token first. Beyond the common support ids are −1 and
        log-probabilities −inf.

    Example:
        >>> import torch
        >>> from sglang_optimal.mixing import AlphaParams, Sides, mix, top_k
        >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.1, 0.2, 0.7]]).log()
        >>> temperature = torch.ones(1)
        >>> sides = Sides(mix(teacher, student, temperature, AlphaParams.uniform(1)), teacher, student, temperature)
        >>> ids, p_teacher, p_student, p_mixture = top_k("student", 2, sides)[0]
        >>> ids.tolist(), [round(p, 2) for p in p_teacher.exp().tolist()]
        ([2.0, 1.0], [0.1, 0.2])
    """
    ids = _top_ids(side, k, sides)
    logprobs = sides.logprobs(ids.clamp(min=0))
    none = (ids < 0).unsqueeze(1)
    return torch.cat([ids.unsqueeze(1).float(), logprobs.masked_fill_(none, -torch.inf)], dim=1)


def _top_ids(side: str, k: int, sides: Sides) -> Tensor:
    """[B, k] int64 ids of the most likely tokens; −1 beyond the support."""
    if side == "mixture":
        ranked = sides.mixture_logits()
    else:
        own, other = sides.teacher_logits, sides.student_logits
        if side == "student":
            own, other = other, own
        ranked = own.masked_fill(other.isneginf(), -torch.inf)
    best = ranked.topk(min(k, ranked.shape[-1]), dim=-1)
    ids = best.indices.masked_fill(best.values.isneginf(), -1)
    missing = k - ids.shape[-1]
    return torch.nn.functional.pad(ids, (0, missing), value=-1) if missing > 0 else ids


def _mixed(teacher: Tensor, student: Tensor, alpha: Tensor) -> Tensor:
    """(1−α)·z_s + α·z_t; −inf where either is: a weight of 0 or beyond [0, 1] would make NaN or +inf of it."""
    dead = teacher.isneginf() | student.isneginf()
    return torch.lerp(student, teacher, alpha).masked_fill_(dead, -torch.inf)


class _Row:
    """Log-probabilities of B rows over the common support, made once for all series; 0 outside of it.

    Attributes:
        t, s, q: [B, V] float32. alive: [B, V] bool.
    """

    def __init__(self, sides: Sides, token_ids: Tensor):
        m, temperature = sides.mixture, sides._temperature
        t, s = sides.teacher_logits.float(), sides.student_logits.float()
        dead = t.isneginf() | s.isneginf()
        self.alive = ~dead
        self.token_ids = token_ids.unsqueeze(-1)
        self.t = (t / temperature).sub_(m.teacher_log_z[:, None]).masked_fill_(dead, 0.0)
        self.s = (s / temperature).sub_(m.student_log_z[:, None]).masked_fill_(dead, 0.0)
        q = torch.lerp(s, t, m.alpha[:, None]).div_(temperature).sub_(m.mixture_log_z[:, None])
        self.q = q.masked_fill_(dead, 0.0)

    def mean(self, log_p: Tensor, values: Tensor) -> Tensor:
        """[B] the expectation of ``values`` under exp(``log_p``)."""
        return (log_p.exp().mul_(self.alive) * values).sum(-1)

    def ess(self, log_p: Tensor) -> Tensor:
        """[B] 1 / Σ p²/q."""
        exponent = (2.0 * log_p - self.q).masked_fill_(~self.alive, -torch.inf)
        return exponent.logsumexp(-1).neg_().exp_()

    def rank(self, log_p: Tensor) -> Tensor:
        """[B] 1 + how many tokens are more likely."""
        more = (log_p > log_p.gather(-1, self.token_ids)) & self.alive
        return more.sum(-1).float() + 1.0


_SERIES: dict[str, Callable[[_Row], Tensor]] = {
    "teacher_entropy": lambda row: row.mean(row.t, -row.t),
    "student_entropy": lambda row: row.mean(row.s, -row.s),
    "mixture_entropy": lambda row: row.mean(row.q, -row.q),
    "kl_student_teacher": lambda row: row.mean(row.s, row.s - row.t).clamp_(min=0.0),
    "kl_teacher_student": lambda row: row.mean(row.t, row.t - row.s).clamp_(min=0.0),
    "ess_student": lambda row: row.ess(row.s),
    "ess_teacher": lambda row: row.ess(row.t),
    "teacher_rank": lambda row: row.rank(row.t),
    "student_rank": lambda row: row.rank(row.s),
}
