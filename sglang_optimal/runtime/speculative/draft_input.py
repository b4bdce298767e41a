"""What one step with drafts leaves to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType


@dataclasses.dataclass
class MixingDraftInput(SpecInput):
    """What one step leaves to the next: the last token of each request, whose KV neither model has yet.

    Attributes:
        bonus_tokens: [B]; None under overlap, until the step that reads them begins.
        future_indices: [B] under overlap, where they will be found; else None.
    """

    bonus_tokens: torch.Tensor | None = None
    future_indices: torch.Tensor | None = None
    # SGLang's relay of drafts between steps reads these; there is nothing to relay.
    topk_p: torch.Tensor | None = None
    topk_index: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__(SpecInputType.EAGLE_DRAFT)

    def filter_batch(self, new_indices: torch.Tensor, new_indices_cpu: list[int] | None = None) -> None:
        """Keep the given rows."""
        self._replace(lambda values: values[new_indices])

    def merge_batch(self, other: MixingDraftInput) -> None:
        """Add the rows of ``other`` behind."""
        self._replace(lambda values: torch.cat([values, other._values()]))

    def _values(self) -> torch.Tensor:
        """What there is of the two."""
        values = self.bonus_tokens if self.future_indices is None else self.future_indices
        if values is None:
            raise RuntimeError("a step left no tokens to the next")
        return values

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.future_indices is not None:
            self.future_indices = change(self._values())
        else:
            self.bonus_tokens = change(self._values())
