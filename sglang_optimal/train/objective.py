"""A loss by its name: which columns it needs, and its value for a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sglang_optimal.train.checks import check_beta, check_choice
from sglang_optimal.train.distributions import sampled_logprobs
from sglang_optimal.train.importance import LEVELS, importance_weights, weighted_nll
from sglang_optimal.train.losses import forward_kl, generalised_jsd, mixture_kl, reverse_kl
from sglang_optimal.train.policy_gradient import policy_gradient_loss
from sglang_optimal.train.top_k import TopK

LOSSES = ("sft", "importance_sft", "policy_gradient", "forward_kl", "reverse_kl", "jsd", "mixture_kl")
SIDES = ("teacher", "student", "mixture")

# The distribution that is learned from, and whose ids say most: for the reverse KL the student's own mass decides.
_TOP_K = {
    "forward_kl": ("teacher", "teacher"),
    "reverse_kl": ("teacher", "student"),
    "jsd": ("teacher", "teacher"),
    "mixture_kl": ("mixture", "mixture"),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a trainer minimises.

    Attributes:
        loss: one of `LOSSES`. ``sft`` is −log p_s of the samples at temperature 1; all others are at the request's.
        beta: of ``jsd``.
        top_k_ids: whose likeliest ids the divergences are taken at, one of `SIDES`; None: the teacher's, for
            ``reverse_kl`` the student's, for ``mixture_kl`` the mixture's.
        weights_towards: of ``importance_sft``: ``teacher`` or ``student``.
        weight_level: of ``importance_sft``: ``token`` or ``sequence``.
        max_weight: the largest weight of ``importance_sft`` and ratio of ``policy_gradient``; None: no limit.

    Raises:
        ValueError: names the field.
    """

    loss: str
    beta: float = 0.5
    top_k_ids: str | None = None
    weights_towards: str = "teacher"
    weight_level: str = "token"
    max_weight: float | None = 10.0

    def __post_init__(self):
        check_choice("loss", self.loss, LOSSES)
        check_beta(self.beta)
        if self.top_k_ids is not None:
            check_choice("top_k_ids", self.top_k_ids, SIDES)
        check_choice("weights_towards", self.weights_towards, ("teacher", "student"))
        check_choice("weight_level", self.weight_level, LEVELS)
        if self.max_weight is not None and not self.max_weight > 0:
            raise ValueError(f"max_weight: must be positive, got {self.max_weight}.")

    @property
    def series(self) -> tuple[str, ...]:
        """Per-token columns that the loss needs; ``behaviour_logprob`` stands for what drew the tokens."""
        return {
            "importance_sft": (f"{self.weights_towards}_logprob", "behaviour_logprob"),
            "policy_gradient": ("teacher_logprob", "behaviour_logprob"),
        }.get(self.loss, ())

    @property
    def top_k(self) -> tuple[str, str, str] | None:
        """Columns of ids, log-probabilities and tail that the loss needs."""
        if self.loss not in _TOP_K:
            return None
        of, default = _TOP_K[self.loss]
        at = self.top_k_ids or default
        return f"top_k_{at}_ids", f"top_k_{at}_{of}_logprobs", f"top_k_{at}_{of}_tail"

    @property
    def needs_temperature(self) -> bool:
        return self.loss != "sft"

    def __call__(self, student_logits: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of every token.

        Args:
            student_logits: [B, L, V], those that predict the completion's tokens.
            batch: as `RecordCollator` makes it.

        Returns:
            [B, L], 0 where masked; and figures to log, scalars without gradient.
        """
        mask = batch["mask"]
        if self.top_k is not None:
            target = TopK(batch["top_k_ids"], batch["top_k_logprobs"], batch["top_k_tail"])
            asked: dict[str, Any] = {"temperature": batch["temperature"], "mask": mask, "reduction": "none"}
            if self.loss == "jsd":
                return generalised_jsd(student_logits, target, beta=self.beta, **asked), {}
            divergence = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "mixture_kl": mixture_kl}[self.loss]
            return divergence(student_logits, target, **asked), {}
        logprobs = sampled_logprobs(
            student_logits, batch["token_ids"], batch["temperature"] if self.needs_temperature else 1.0
        )
        if self.loss == "sft":
            return weighted_nll(logprobs, mask.to(logprobs.dtype), mask, reduction="none"), {}
        behaviour = batch["behaviour_logprob"]
        if self.loss == "importance_sft":
            weights = importance_weights(
                batch[f"{self.weights_towards}_logprob"], behaviour, mask,
                level=self.weight_level, max_weight=self.max_weight,
            )  # fmt: skip
            figures = {"ess_ratio": weights.ess_ratio, "clipped": weights.clipped}
            return weighted_nll(logprobs, weights.weights, mask, reduction="none"), figures
        ratios = importance_weights(logprobs.detach(), behaviour, mask, max_weight=self.max_weight, normalise=False)
        loss = policy_gradient_loss(
            logprobs, batch["teacher_logprob"], behaviour, mask, max_ratio=self.max_weight, reduction="none"
        )
        return loss, {"ess_ratio": ratios.ess_ratio, "clipped": ratios.clipped}
