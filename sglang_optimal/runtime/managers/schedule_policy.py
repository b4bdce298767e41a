"""Admission: SGLang's, which knows one context of a request, for both."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from sglang_optimal.runtime.core import guest_of
from sglang_optimal.runtime.mem_cache.guest_kv import GuestKV


class MixedPrefillAdder(PrefillAdder):
    """Admits a mixed request only when its guest context fits too, and reserves it there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.guest_kv: GuestKV = self.tree_cache.guest_kv
        running = self.running_batch.reqs if self.running_batch is not None else []
        # Tokens that admitted requests will still decode, estimated as SGLang does for the host's pool.
        mixed = [req for req in running if guest_of(req) is not None]
        future = sum(self._get_running_request_total_token_offset(req) for req in mixed)
        self._one_pool = self.guest_kv.one_pool
        self._guest_future = future
        if self._one_pool:
            self.memory_budget.total_offset += future

    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        """SGLang's, where the guest's context fits as well; its slots are taken with the host's first chunk."""
        if guest_of(req) is None:
            return super().add_one_req(req, has_chunked_req, truncation_align_size)
        kv = self.guest_kv
        if not kv.has_state():
            return AddReqResult.NO_TOKEN
        state = kv.match(req)
        max_new = min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0), CLIP_MAX_NEW_TOKENS)
        later = max_new + kv.page_size  # as SGLang: the last page may not be full
        if not self._one_pool and state.extend_len + later > kv.available() - self._guest_future:
            kv.unmatch(state)
            return AddReqResult.NO_TOKEN
        self._reserve(state.extend_len, later)
        result = super().add_one_req(req, has_chunked_req, truncation_align_size)
        if self.can_run_list and self.can_run_list[-1] is req:
            kv.allocate(req, state)
            self._reserve(-state.extend_len, 0)  # taken from the pool now
            self._guest_future += later
            # The step computes the guest's prompt as well: let it use up the same compute budget.
            self.rem_input_tokens -= state.extend_len
        else:
            self._reserve(-state.extend_len, -later)
            kv.unmatch(state)
        return result

    def _reserve(self, now: int, later: int) -> None:
        """Tokens that the guest takes from the host's budget, where both have one pool."""
        if self._one_pool:
            self.memory_budget.current_offset += now
            self.memory_budget.total_offset += now + later
