"""What every series and the most likely tokens of one position should be, in float64, from `oracle.mix`."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

CLOSE = 2e-4
"""Log-probabilities (nats) nearer than this float32 may order either way."""


def expected_series(step: oracle.Mixture, token: int, behaviour: Tensor) -> dict[str, float]:
    """All series of one token but the ranks; ``behaviour``: what it was drawn from, [V]."""
    alive = step.mixture.isfinite()
    t, s, q = (row[alive] for row in (step.teacher, step.student, step.mixture))
    ess_s, ess_t = (float(-torch.logsumexp(2 * p - q, -1)) for p in (s, t))
    return {
        "alpha": step.alpha,
        "teacher_logprob": float(step.teacher[token]),
        "student_logprob": float(step.student[token]),
        "mixture_logprob": float(step.mixture[token]),
        "kl_to_student": oracle.kl_divergence(q, s),
        "kl_to_teacher": oracle.kl_divergence(q, t),
        "ess_ratio": math.exp(ess_s - ess_t),
        "teacher_entropy": oracle.entropy(t),
        "student_entropy": oracle.entropy(s),
        "mixture_entropy": oracle.entropy(q),
        "kl_student_teacher": oracle.kl_divergence(s, t),
        "kl_teacher_student": oracle.kl_divergence(t, s),
        "ess_student": math.exp(ess_s),
        "ess_teacher": math.exp(ess_t),
        "behaviour_logprob": float(behaviour[token].log()),
    }


def check_series(
    values: dict[str, float], step: oracle.Mixture, token: int, behaviour: Tensor, tolerance: float
) -> None:
    """One token's series are right; ``tolerance``: absolute, and of what is larger than 1 relative."""
    expected = expected_series(step, token, behaviour)
    assert values.keys() == {*expected, "teacher_rank", "student_rank"}
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=tolerance, rel=tolerance), name
    for side in ("teacher", "student"):
        row = getattr(step, side)
        row = row[step.mixture.isfinite()] - row[token]
        least, most = int((row > CLOSE).sum()) + 1, int((row > -CLOSE).sum())
        assert least <= values[f"{side}_rank"] <= max(most, least), side


def check_top_k(entry: dict[str, Any], side: str, k: int, step: oracle.Mixture, tolerance: float) -> None:
    """One token's entry in a side's most likely ones: lists of the same length, which end with the support."""
    ids = entry["ids"]
    own = getattr(step, side).masked_fill(~step.mixture.isfinite(), -torch.inf)
    count = min(k, int(step.mixture.isfinite().sum()))
    assert len(ids) == len(set(ids)) == count
    mine = own[torch.tensor(ids)]
    assert mine.tolist() == pytest.approx(own.topk(count).values.tolist(), abs=CLOSE)
    for name in ("teacher", "student", "mixture"):
        row = getattr(step, name)[torch.tensor(ids)]
        assert entry[f"{name}_logprobs"] == pytest.approx(row.tolist(), abs=tolerance, rel=tolerance), name
        assert entry[f"{name}_tail"] == pytest.approx(max(1.0 - float(row.exp().sum()), 0.0), abs=1e-5), name


def entry_of(top_k: dict[str, dict[str, list]], side: str, position: int) -> dict[str, Any]:
    """One position's part of ``meta_info["top_k"]``."""
    return {name: values[position] for name, values in top_k[side].items()}
