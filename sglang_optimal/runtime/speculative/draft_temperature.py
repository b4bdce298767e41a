"""How sharp the guest's distribution is when it drafts: as sharp as agrees best with what the mixture draws from."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_optimal.mixing.filters import SamplingFilters

FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3)
EVERY = 8
"""Steps between two looks; each costs a softmax of the first position's rows for every factor."""
_NEW = 0.2


class DraftTemperature:
    """A factor on the temperature of drafts. A draft from p is kept with chance Σ min(p, q*), and the text follows q*
    whatever p is, so p may be any that agrees better: the mixture is often sharper than the student alone, because the
    teacher knows more.

    Everything stays on the device, so that no step waits for it.
    """

    def __init__(self, device: torch.device | str):
        self._factors = torch.tensor(FACTORS, device=device)
        self._overlaps = torch.zeros(len(FACTORS), device=device)
        self._overlaps[FACTORS.index(1.0)] = 1e-6  # until something is known
        self._steps = 0

    def sharpened(self, truncation: SamplingFilters) -> SamplingFilters:
        """The requests' settings with the temperature to draft at."""
        # Not by indexing with a number that the device has: the CPU would wait for it.
        return truncation.scaled(self._factors.index_select(0, self._overlaps.argmax(0, keepdim=True)))

    def observe(self, guest_logits: Tensor, target: Tensor, truncation: SamplingFilters) -> None:
        """Take note of the first position of a step.

        Args:
            guest_logits: [n, v]. target: [n, v], probabilities that the mixture draws from.
            truncation: of the rows.
        """
        self._steps += 1
        if self._steps % EVERY != 1:
            return
        overlaps = [
            torch.minimum(truncation.scaled(factor).probs(guest_logits), target).sum(-1).mean()
            for factor in self._factors
        ]
        new = torch.stack(overlaps)
        new = torch.where(new.isfinite(), new, self._overlaps)  # a model may have gone wrong
        weight = 1.0 if self._steps == 1 else _NEW
        self._overlaps.lerp_(new, weight)
