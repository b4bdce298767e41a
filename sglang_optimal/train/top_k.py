"""A distribution known at k ids and by the mass of all others: what top-k arrays of a record hold for one model."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sglang_optimal.train.checks import working_dtype


@dataclasses.dataclass(frozen=True)
class TopK:
    """Log-probabilities of k tokens at each position, and the mass of the tokens that are not among them, the tail.

    All are of one model at one temperature, over the common support of teacher and student, so that for each position
    Σ exp(logprobs) + tail = 1. In a record ``TopK(top_k_X_ids, top_k_X_Y_logprobs, top_k_X_Y_tail)`` is the
    distribution of Y at the ids that are likeliest under X.

    Attributes:
        ids: [..., k] integers, different from one another at each position.
        logprobs: [..., k] float, nats; −inf for a token outside the common support.
        tail: [...] float, a probability. A negative one is rounding, and read as 0.
        own: the ids are the k likeliest of this distribution itself (X is Y), so that no token of the tail is likelier
            than any of them. Only `divergence_bounds` uses it.

    Raises:
        ValueError: the shapes do not fit, or the ids are not integers.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    own: bool = False

    def __post_init__(self):
        if self.ids.is_floating_point() or self.ids.dtype == torch.bool:
            raise ValueError(f"ids: must be integers, got {self.ids.dtype}.")
        if self.ids.ndim < 1 or self.ids.shape[-1] < 1:
            raise ValueError(f"ids: must be [..., k] with k ≥ 1, got {list(self.ids.shape)}.")
        if self.logprobs.shape != self.ids.shape:
            raise ValueError(
                f"logprobs: must be one for each of ids, {list(self.ids.shape)}, got {list(self.logprobs.shape)}."
            )
        if self.tail.shape != self.ids.shape[:-1]:
            raise ValueError(
                f"tail: must be one for each position, {list(self.ids.shape[:-1])}, got {list(self.tail.shape)}."
            )

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int | None = None, *, ids: Tensor | None = None, temperature: float = 1.0
    ) -> TopK:
        """Return what top-k arrays would say of a model whose logits are all there.

        Args:
            logits: [..., V], any float dtype.
            k: take the k likeliest tokens, or all V if that is fewer.
            ids: [..., k] take these tokens instead.
            temperature: positive.

        Returns:
            float32 (float64 where the logits are), without gradient.

        Raises:
            ValueError: neither or both of ``k`` and ``ids``, k < 1, or a temperature that is not positive.
        """
        if (k is None) == (ids is None):
            raise ValueError("k: give either k or ids.")
        if k is not None and k < 1:
            raise ValueError(f"k: must be at least 1, got {k}.")
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}.")
        with torch.no_grad():
            logprobs = (logits.to(working_dtype(logits)) / temperature).log_softmax(-1)
            if ids is None:
                assert k is not None
                ids = logprobs.topk(min(k, logprobs.shape[-1])).indices
                own = True
            else:
                own = False
            # The mass of the others by itself: 1 − Σ would leave nothing but rounding of a small tail.
            tail = logprobs.scatter(-1, ids, -torch.inf).exp().sum(-1)
            return cls(ids, logprobs.gather(-1, ids), tail, own)

    def log_masses(self) -> Tensor:
        """[..., k + 1] float32 (float64 where logprobs are): the k log-probabilities, then the log of the tail."""
        logprobs = self.logprobs.to(working_dtype(self.logprobs))
        tail = self.tail.to(logprobs.dtype).clamp(min=0).log()
        return torch.cat([logprobs, tail.unsqueeze(-1)], -1)
