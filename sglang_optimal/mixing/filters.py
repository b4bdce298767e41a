"""Temperature, top-k, top-p and min-p of whole rows, as SGLang's samplers apply them.

Without kernels a row is sorted and all limits apply to that one order, so of equal tokens at an edge some stay and some
go. Kernels find thresholds instead, so equal tokens stay together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

# Ranks looked at before a row is sorted whole, on a CPU, where sorting a vocabulary costs more than a small forward.
_LEADING = 1024


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Top-k and top-p of a device, without sorting.

    Attributes:
        top_k, top_p: (probs [R, V] float32, limit [R]) -> new [R, V] float32 of the tokens that stay, renormalised;
            None where no row has that limit.
        joint: True: top-p counts the mass of the whole row, and no row has a min-p. False: the limits apply in turn;
            top-p counts the mass that top-k left, and min-p comes last.
    """

    top_k: Callable[[Tensor, Tensor], Tensor] | None
    top_p: Callable[[Tensor, Tensor], Tensor] | None
    joint: bool


@dataclasses.dataclass
class SamplingFilters:
    """Temperature, top-k, top-p and min-p of R rows. All tensors are on the device of the logits (cpu or cuda).

    Attributes:
        temperature: [R] float32, positive.
        top_k: [R] integer, at least 1; 1 for a greedy row, at least V for no limit.
        top_p: [R] float32 in (0, 1]; 1 for no limit.
        min_p: [R] float32 in [0, 1], relative to the most likely token; 0 for no limit.
        needed: whether any row has a limit. False skips all of them.
        greedy: whether every row takes its most likely token.
        some_greedy: whether any row may do so; False saves looking for it.
        largest_top_k: an upper bound of ``top_k``, known on the host; None: unknown, which sorts whole rows if need be.
        kernels: the device's top-k and top-p; None: sort.

    Example:
        >>> import torch
        >>> from sglang_optimal.mixing import SamplingFilters
        >>> logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(2, 1)
        >>> filters = SamplingFilters(
        ...     temperature=torch.tensor([1.0, 1.0]),
        ...     top_k=torch.tensor([2, 4]),
        ...     top_p=torch.tensor([1.0, 0.8]),
        ...     min_p=torch.tensor([0.0, 0.0]),
        ...     needed=True,
        ...     greedy=False,
        ... )
        >>> [[round(p, 3) for p in row] for row in filters.probs(logits).tolist()]
        [[0.667, 0.333, 0.0, 0.0], [0.556, 0.278, 0.167, 0.0]]
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    needed: bool
    greedy: bool
    some_greedy: bool = True
    largest_top_k: int | None = None
    kernels: Kernels | None = None

    def repeat(self, times: int) -> SamplingFilters:
        """Return the settings of [times · R] rows: all rows once, then all rows again."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return dataclasses.replace(self, **{name: getattr(self, name).repeat(times) for name in names})

    def scaled(self, factor: Tensor) -> SamplingFilters:
        """Return the same limits at ``factor`` times the temperature.

        Args:
            factor: float32 tensor of one element (or [R]), positive, on the device of the temperature.
        """
        return dataclasses.replace(self, temperature=self.temperature * factor)

    def probs(self, logits: Tensor) -> Tensor:
        """Return the distribution to sample from.

        Args:
            logits: [R, V], any float dtype, on the device of the settings.

        Returns:
            New [R, V] float32; each row sums to 1. A greedy row has one token: the first of the most likely.

        Raises:
            RuntimeError: PyTorch's, where the number of rows is not R or the devices differ.
        """
        probs = (logits.float() / self.temperature.unsqueeze(-1)).softmax(-1)
        if not self.needed:
            return probs
        # Each cut's result takes the place of its argument, so that never more than two are in memory.
        for cut in self._cuts():
            probs = cut(probs)
        return self._greedy_as_one(probs, logits) if self.some_greedy else probs

    def _cuts(self) -> list[Callable[[Tensor], Tensor]]:
        if self.kernels is None:
            return [self._cut_sorted]
        top_k, top_p = self.kernels.top_k, self.kernels.top_p
        by_rank = [] if top_k is None else [lambda probs: top_k(probs, self.top_k)]
        by_mass = [] if top_p is None else [lambda probs: top_p(probs, self.top_p)]
        # Ranks do not change when less likely tokens go: top-k after top-p is both on the whole row.
        return by_mass + by_rank if self.kernels.joint else [*by_rank, *by_mass, self._cut_min_p]

    def _cut_min_p(self, probs: Tensor) -> Tensor:
        """In place."""
        probs.masked_fill_(probs < self.min_p.unsqueeze(-1) * probs.amax(-1, keepdim=True), 0.0)
        return probs.div_(probs.sum(-1, keepdim=True))

    def _cut_sorted(self, probs: Tensor) -> Tensor:
        """All limits, by the order of each row."""
        width = probs.shape[-1]
        most = width if self.largest_top_k is None else min(self.largest_top_k, width)
        count = min(_LEADING, most) if probs.device.type == "cpu" else most
        values, index, before = _sorted(probs, count)
        if count < most and not bool(self._closed(values, before).all()):
            values, index, before = _sorted(probs, most)
        rank = torch.arange(values.shape[-1], device=probs.device)
        keep = (rank < self.top_k.unsqueeze(-1)) & (before <= self.top_p.unsqueeze(-1))
        keep &= values >= self.min_p.unsqueeze(-1) * values[:, :1]
        values.masked_fill_(keep.logical_not_(), 0.0)
        values /= values.sum(-1, keepdim=True)
        return torch.zeros_like(probs).scatter_(-1, index, values)

    def _closed(self, values: Tensor, before: Tensor) -> Tensor:
        """[R] whether nothing after the sorted ranks can be kept."""
        by_mass, by_height = before[:, -1] > self.top_p, values[:, -1] < self.min_p * values[:, 0]
        return (self.top_k <= values.shape[-1]) | by_mass | by_height

    def _greedy_as_one(self, probs: Tensor, logits: Tensor) -> Tensor:
        """In place. Logits, because a softmax makes equals of what differs by less than it can tell."""
        greedy, best = (self.top_k <= 1).unsqueeze(-1), logits.argmax(-1, keepdim=True)
        chance = probs.gather(-1, best).masked_fill_(greedy, 1.0)
        return probs.masked_fill_(greedy, 0.0).scatter_(-1, best, chance)


def _sorted(probs: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest of each row, their columns, and the mass before each."""
    values, index = probs.topk(count, dim=-1) if count < probs.shape[-1] else probs.sort(-1, descending=True)
    return values, index, values.cumsum(-1).sub_(values)
