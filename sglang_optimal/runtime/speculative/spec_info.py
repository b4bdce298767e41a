"""Speculative mixing as one of SGLang's speculative algorithms: what its scheduler asks of one.

The scheduler's part (several tokens a step, KV slots ahead of them, the lengths that come back under overlap) is
SGLang's own. The seam misses a few members that it calls on its built-in algorithms, which are added here.
"""

from __future__ import annotations

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_optimal.names import ALGORITHM


class MixingCustomSpecAlgo(CustomSpecAlgo):
    """The guest drafts, the mixture of both models decides."""

    def has_draft_kv(self) -> bool:
        """No: the host's pool has none, and the guest has a pool of its own."""
        return False  # in the host's pool; the guest has its own

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
