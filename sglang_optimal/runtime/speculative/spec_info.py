"""Speculative mixing as one of SGLang's speculative algorithms: what its scheduler asks of one.

The scheduler's part (several tokens a step, KV slots ahead of them, the lengths that come back under overlap) is
SGLang's own. The seam misses a few members that it calls on its built-in algorithms, which are added here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType, SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_optimal.names import ALGORITHM


class MixingCustomSpecAlgo(CustomSpecAlgo):
    """The student drafts, the mixture of both models decides."""

    def has_draft_kv(self) -> bool:
        """No: the teacher's pool has none, and the student has a pool of its own."""
        return False  # in the teacher's pool; the student has its own

    def need_topk(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def create_future_map(
        self, device, req_to_token_pool, needs_cpu_seq_lens: bool = True, needs_confidence_relay: bool = False
    ):
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)


def register() -> None:
    """Register ``--speculative-algorithm OPTIMAL``."""
    SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, spec_class=MixingCustomSpecAlgo)(_worker_class)


def _worker_class(server_args):
    from sglang_optimal.runtime.speculative.spec_worker import MixingSpecWorker

    return MixingSpecWorker


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
