"""The ids on which a mixture lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

OUTSIDE = -3.0e4
"""A logit that no token is drawn with, in float16 too. Finite, because a mixture of two infinities is none."""


@dataclasses.dataclass(frozen=True)
class Support:
    """The ids that mean the same token to both models, or none to either.

    Attributes:
        size: number of ids that both models' heads have; no other one is in the support.
        outside: [m] int64 on the device, the ids below ``size`` that one tokenizer alone has; None for none.
    """

    size: int
    outside: torch.Tensor | None = None

    @classmethod
    def of_ids(cls, size: int, outside: Sequence[int], device: torch.device | str) -> Support:
        """``outside``: may have ids from ``size`` on."""
        ids = [index for index in outside if index < size]
        return cls(size, torch.tensor(ids, dtype=torch.int64, device=device) if ids else None)

    def cut(self, logits: torch.Tensor) -> torch.Tensor:
        """A model's logits [n, V] in the support: a view [n, size], whose ids outside are overwritten in place."""
        known = logits[..., : self.size]
        return known if self.outside is None else known.index_fill_(-1, self.outside, OUTSIDE)

    def exclude(self, mixed: torch.Tensor) -> torch.Tensor:
        """The mixture's logits [n, V], in place, with -inf for every id that is not in the support."""
        mixed[..., self.size :] = -torch.inf
        return mixed if self.outside is None else mixed.index_fill_(-1, self.outside, -torch.inf)
