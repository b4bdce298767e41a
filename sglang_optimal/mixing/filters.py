"""Temperature, top-k, top-p and min-p of whole rows, as SGLang's samplers apply them.

There are two of those. Without kernels a row is sorted and all limits look at that one order, so of equal tokens at an
edge some stay and some go. Kernels find thresholds instead, so equal tokens stay together.
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
        top_k, top_p: (probs [R, V] float32, limit [R]) -> new [R, V] float32, what is kept, renormalised; None where no
            row has that limit.
        joint: whether top-p counts the mass of the whole row, and no row has a min-p. Else the limits come in turn:
            top-p counts the mass of what top-k left, and min-p comes last.
    """

    top_k: Callable[[Tensor, Tensor], Tensor] | None
    top_p: Callable[[Tensor, Tensor], Tensor] | None
    joint: bool


@dataclasses.dataclass
class SamplingFilters:
    """Temperature, top-k, top-p and min-p of R rows.

    Attributes:
        temperature, top_p, min_p: [R] float32. top_k: [R] integer, 1 for a greedy row.
        needed: whether any row truncates at all.
        greedy: whether every row takes its most likely token. some_greedy: whether any row may.
        largest_top_k: at least as large as every top-k; None when that is unknown.
        kernels: None to sort.

    Example:
        >>> one = torch.ones(1)
        >>> filters = SamplingFilters(one, torch.tensor([2]), one, 0 * one, needed=True, greedy=False)
        >>> filters.probs(torch.tensor([[1.0, 3.0, 1.5, 0.0]]))
        tensor([[0.0000, 0.8176, 0.1824, 0.0000]])
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
        """The settings of [times · R] rows, position after position."""
        names = ("temperature", "top_k", "top_p", "min_p")
        return dataclasses.replace(self, **{name: getattr(self, name).repeat(times) for name in names})

    def scaled(self, factor: Tensor) -> SamplingFilters:
        """The same with another temperature: ``factor`` (a scalar) times as high."""
        return dataclasses.replace(self, temperature=self.temperature * factor)

    def probs(self, logits: Tensor) -> Tensor:
        """What is sampled from: [R, V] float32 that sums to 1 in each row, from logits [R, V].

        A greedy row has one token, the first of the most likely, as where all rows are greedy.
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
