"""Every ScheduleBatch that is derived from the scheduled one, and what the guest does for it."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_optimal.runtime.core import DecodePlan, MixedRows, PrefillChunk, PrefillPlan, guest_of
from sglang_optimal.runtime.mem_cache.guest_kv import GuestKV
from sglang_optimal.runtime.model_executor.host_copy import sent
from sglang_optimal.runtime.sampling.scoring import take_guest_states, want_hidden_states


class Planner:
    """Makes the plan of each batch and allocates the guest's slots for it, on the scheduler's stream."""

    def __init__(self, kv: GuestKV, chunk_size: int | None):
        self.kv = kv
        self.chunk_size = chunk_size if chunk_size and chunk_size > 0 else None
        self._cached_reqs: list | None = None
        self._cached_rows: MixedRows | None = None

    def plan(self, batch: ScheduleBatch) -> DecodePlan | PrefillPlan | None:
        """The guest's part of ``batch``; None when no row of it is mixed."""
        if batch.forward_mode.is_decode():
            return self._decode(batch)
        if batch.forward_mode.is_extend():
            return self._prefill(batch)
        return None

    def _decode(self, batch: ScheduleBatch) -> DecodePlan | None:
        rows = self._decode_rows(batch)
        if rows is None:
            return None
        seq_lens, cpu = rows.guest_lens(batch)
        slots = self.kv.decode_slots(rows.select(batch.req_pool_indices), seq_lens, cpu)
        return DecodePlan(rows=rows, seq_lens=seq_lens, seq_lens_cpu=cpu, out_cache_loc=slots)

    def _decode_rows(self, batch: ScheduleBatch) -> MixedRows | None:
        # SGLang rebinds batch.reqs whenever the composition changes, so identity of the list is identity of the rows.
        if self._cached_reqs is not batch.reqs:
            row_ids = [i for i, req in enumerate(batch.reqs) if guest_of(req) is not None]
            self._cached_rows = MixedRows.build(batch, row_ids, self.kv.as_guest) if row_ids else None
            self._cached_reqs = batch.reqs
        return self._cached_rows

    def _prefill(self, batch: ScheduleBatch) -> PrefillPlan | None:
        mixed = [i for i, req in enumerate(batch.reqs) if guest_of(req) is not None]
        for i in mixed:
            self.kv.bind(batch.reqs[i])
        # The guest's prompt runs with the last chunk of the host's.
        complete = [i for i in mixed if _prompt_is_complete(batch.reqs[i])]
        for i in complete:
            self.kv.alias_host_prefix(batch.reqs[i])
        if not complete:
            return None
        rows = MixedRows.build(batch, complete, self.kv.as_guest)
        states = [req.mixing.guest.kv for req in rows.reqs]
        for state in states:
            state.forwarded = True
        return PrefillPlan(
            rows=rows,
            micro_batches=micro_batches(rows.reqs, self.chunk_size, self.kv.page_size),
            after_host=any(state.aliases_host for state in states),
        )


def _prompt_is_complete(req: Req) -> bool:
    return req.extend_end == len(req.full_untruncated_fill_ids)


def micro_batches(reqs: list[Req], chunk_size: int | None, page_size: int = 1) -> list[list[PrefillChunk]]:
    """The guest's prompts in forwards of at most ``chunk_size`` tokens; None: one forward.

    Only whole pages go before a cut, as in SGLang's own chunks, or one page where a chunk is smaller.
    """
    limit = max(chunk_size, page_size) if chunk_size else 1 << 60
    batches: list[list[PrefillChunk]] = [[]]
    room = limit
    for req in reqs:
        state = req.mixing.guest.kv
        start, length = state.start, len(state.ids)
        while start < length:
            end = length if length - start <= room else (start + room) // page_size * page_size
            if end <= start:
                batches.append([])
                room = limit
                continue
            slots = state.slots[start - state.start : end - state.start]
            row, last = req.kv.req_pool_idx, end == length
            batches[-1].append(PrefillChunk(req, row, state.ids, start, end, slots, last, state.recurrent))
            room -= end - start
            start = end
    return batches


def decode_part(
    batch: ScheduleBatch, plan: DecodePlan, req_pool_offset: int = 0, input_ids: torch.Tensor | None = None
) -> ScheduleBatch:
    """The guest's decode batch of the mixed rows. ``req_pool_offset``: added to the row numbers."""
    rows = plan.rows
    return decode_rows(
        batch,
        rows.reqs,
        input_ids=rows.select(batch.input_ids) if input_ids is None else input_ids,
        req_pool_indices=rows.select(batch.req_pool_indices) + req_pool_offset,
        seq_lens=plan.seq_lens,
        seq_lens_cpu=plan.seq_lens_cpu,
        out_cache_loc=plan.out_cache_loc,
    )


def decode_rows(
    batch: ScheduleBatch,
    reqs: list,
    *,
    input_ids: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor | None,
    out_cache_loc: torch.Tensor,
) -> ScheduleBatch:
    """A decode batch of any rows, in place of those of ``batch``; all tensors [n], lengths with the new token."""
    part = _guest_batch(batch, reqs)
    part.req_pool_indices = req_pool_indices
    part.req_pool_indices_cpu = None
    _set_tokens(part, input_ids, seq_lens, seq_lens_cpu, out_cache_loc)
    return part


def _set_tokens(
    part: ScheduleBatch,
    input_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor | None,
    out_cache_loc: torch.Tensor,
) -> None:
    """One new token for each row of a decode batch: all [n], lengths with it."""
    part.input_ids = input_ids
    part.seq_lens = seq_lens
    part.seq_lens_cpu = seq_lens_cpu
    part.seq_lens_sum = None
    part.orig_seq_lens = seq_lens.to(torch.int32)
    part.out_cache_loc = out_cache_loc


def prefill_part(batch: ScheduleBatch, chunks: list[PrefillChunk], req_pool_offset: int = 0) -> ScheduleBatch:
    """The extend batch of one forward of the guest's prompts. ``req_pool_offset``: added to the row numbers."""
    part = _guest_batch(batch, [chunk.req for chunk in chunks])
    ends = [chunk.end for chunk in chunks]
    lens = [chunk.end - chunk.start for chunk in chunks]
    ids = array("q")
    for chunk in chunks:
        ids.extend(chunk.ids[chunk.start : chunk.end])
    part.input_ids = sent(ids, batch.device)[1]
    part.req_pool_indices_cpu, part.req_pool_indices = sent(
        [chunk.req_pool_idx + req_pool_offset for chunk in chunks], batch.device
    )
    part.seq_lens_cpu, part.seq_lens = sent(ends, batch.device)
    part.seq_lens_sum = sum(ends)
    part.orig_seq_lens = part.seq_lens.to(torch.int32)
    part.out_cache_loc = torch.cat([chunk.slots for chunk in chunks])
    part.prefix_lens = [chunk.start for chunk in chunks]
    part.extend_lens = lens
    part.extend_num_tokens = sum(lens)
    part.extend_logprob_start_lens = lens
    fresh = [chunk.recurrent for chunk in chunks if chunk.start == 0 and chunk.recurrent is not None]
    if fresh:
        part.mamba_clear_indices = torch.cat(fresh)  # by the forward, behind those of the slots' last requests
    want_hidden_states(part, part.reqs)
    return part


def prefill_micro_batches(
    batch: ScheduleBatch,
    plan: PrefillPlan,
    forward: Callable[[ScheduleBatch], LogitsProcessorOutput],
    req_pool_offset: int = 0,
) -> torch.Tensor:
    """Forward the micro batches one after another. Returns logits [n, V] of each context's last token.

    Args:
        forward: gives what its next call leaves as it is.
    """
    finished: list[torch.Tensor] = []
    for chunks in plan.micro_batches:
        output = forward(prefill_part(batch, chunks, req_pool_offset))
        take_guest_states(chunks, output.hidden_states)
        logits = output.next_token_logits
        # A context that goes on in the next forward is the last of this one.
        done = len(chunks) if chunks[-1].last else len(chunks) - 1
        if done:
            finished.append(logits[:done])
    return finished[0] if len(finished) == 1 else torch.cat(finished)


_KEPT_BY_ROW = (
    "mamba_track_indices", "mamba_track_mask", "mamba_track_seqlens", "mamba_track_seqlens_cpu",
    "mamba_prefill_track_mask_cpu",
)  # fmt: skip
"""What of each row's recurrent state is kept by a forward, of a ScheduleBatch."""
_MADE_READY = ("mamba_cow_src_indices", "mamba_cow_dst_indices", "mamba_clear_indices")
"""The slots of states that a forward copies or clears before it reads them."""


def _guest_batch(batch: ScheduleBatch, reqs: list) -> ScheduleBatch:
    """A shallow copy of the host's batch without what belongs to the host's rows or sampling."""
    part = copy.copy(batch)
    part.reqs = reqs
    part.beam_tail = None
    part.max_seq_len_host = None
    part.input_embeds = part.replace_embeds = part.replace_positions = None
    part.sampling_info = None
    part.has_grammar = False
    part.return_logprob = False
    part.top_logprobs_nums = None
    part.token_ids_logprobs = None
    part.extend_input_logprob_token_ids = None
    part.return_hidden_states_mode = CaptureHiddenMode.NULL
    part.decoding_reqs = None
    _keep_no_states(part)
    # What plain requests have seen decides where later tokens of theirs are (M-RoPE); mixed ones have seen nothing.
    part.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    return part


def _keep_no_states(part: ScheduleBatch) -> None:
    """The host's radix cache keeps states of its rows, and none of the guest's.

    Where forwards ask which rows' to keep, the guest's need an answer of their own: a graph's buffers, which both
    models share, would have the host's.
    """
    tracks = part.mamba_track_mask is not None  # of the host's batch, which it is a copy of
    for name in (*_KEPT_BY_ROW, *_MADE_READY):
        setattr(part, name, None)
    if tracks:
        n, device = len(part.reqs), part.device
        part.mamba_track_mask = torch.zeros(n, dtype=torch.bool, device=device)
        part.mamba_track_indices = torch.zeros(n, dtype=torch.int64, device=device)
        if part.forward_mode.is_extend():
            part.mamba_prefill_track_mask_cpu, part.mamba_track_seqlens_cpu = [False] * n, [-1] * n
            part.mamba_track_seqlens = torch.full((n,), -1, dtype=torch.int64, device=device)


def as_ordinary_decode(batch: ScheduleBatch, last: torch.Tensor) -> ScheduleBatch:
    """The same rows of a speculative decode batch as an ordinary one, whose tokens are ``last`` [B]."""
    part = copy.copy(batch)
    seq_lens = batch.seq_lens + 1
    seq_lens_cpu = None if batch.seq_lens_cpu is None else batch.seq_lens_cpu + 1
    slots = slots_of(batch.req_to_token_pool, batch.req_pool_indices, seq_lens)
    _set_tokens(part, last, seq_lens, seq_lens_cpu, slots)
    part.spec_info = None
    part.spec_algorithm = SpeculativeAlgorithm.NONE
    return part


def slots_of(pool, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """[n] the KV slots of the tokens at position ``seq_lens − 1``."""
    return pool.req_to_token[req_pool_indices, seq_lens - 1].to(torch.int64)


def rows_of(batch: ScheduleBatch) -> int:
    """Rows of a forward of ``batch``: one for each request, and behind them those of beam search."""
    return len(batch.seq_lens)


def _request_of_each_row(batch: ScheduleBatch) -> list[Req]:
    reqs = list(batch.reqs)
    for entry in () if batch.beam_tail is None else batch.beam_tail.entries:
        reqs += [batch.reqs[entry.leader_idx]] * (entry.end - entry.start)
    return reqs


def joined(batch: ScheduleBatch, part: ScheduleBatch) -> ScheduleBatch:
    """One batch with the rows of ``batch`` and then those of ``part``; nothing of the sampling."""
    both = copy.copy(part)
    both.reqs = [*_request_of_each_row(batch), *part.reqs]
    assert len(both.reqs) == rows_of(batch) + rows_of(part), "a row without a request"
    for name in ("input_ids", "req_pool_indices", "seq_lens", "orig_seq_lens", "out_cache_loc", "seq_lens_cpu"):
        setattr(both, name, torch.cat([getattr(batch, name), getattr(part, name)]))
    if part.req_pool_indices_cpu is not None and batch.req_pool_indices_cpu is not None:
        both.req_pool_indices_cpu = torch.cat([batch.req_pool_indices_cpu, part.req_pool_indices_cpu])
    else:
        both.req_pool_indices_cpu = None
    both.seq_lens_sum = None if part.seq_lens_sum is None else batch.seq_lens_sum + part.seq_lens_sum
    both.multimodal_inputs = [req.multimodal_inputs for req in both.reqs]
    if batch.forward_mode.is_extend():
        both.return_hidden_states_mode = max(batch.return_hidden_states_mode, part.return_hidden_states_mode)
        for name in ("prefix_lens", "extend_lens", "extend_logprob_start_lens"):
            setattr(both, name, [*getattr(batch, name), *getattr(part, name)])
        both.extend_num_tokens = batch.extend_num_tokens + part.extend_num_tokens
    _join_states(both, batch, part)
    return both


def _join_states(both: ScheduleBatch, batch: ScheduleBatch, part: ScheduleBatch) -> None:
    """The host's rows keep what its radix cache asks for, the guest's nothing; slots of both are made ready."""
    for name in _KEPT_BY_ROW:
        if (own := getattr(part, name)) is not None:  # then the host's rows have it too
            first = getattr(batch, name)
            setattr(both, name, torch.cat([first, own]) if isinstance(own, torch.Tensor) else [*first, *own])
    for name in _MADE_READY:
        slots = [given for given in (getattr(batch, name), getattr(part, name)) if given is not None]
        setattr(both, name, torch.cat(slots) if slots else None)
