"""What the student has to do for one scheduled batch, worked out before the forward is launched."""

from __future__ import annotations

import dataclasses
from array import array

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_optimal.mixing import AlphaParams
from sglang_optimal.runtime.mem_cache.student_kv import StudentKV, length_offset, student_of
from sglang_optimal.runtime.model_executor.host_copy import sent


@dataclasses.dataclass
class MixedRows:
    """The mixed rows of a batch and their settings; unchanged from step to step while the batch has the same requests.

    Attributes:
        reqs: the requests, as their students' forward sees them.
        host: row numbers. host_index: the same as a tensor, [n] int64 on the host.
        index: the same on the device, or None when every row is mixed.
        offsets, offsets_cpu: [n] int64, student length minus teacher length.
        alpha: per-row settings.
        info: whether any row asked for all per-token series.
    """

    reqs: list[Req]
    host: list[int]
    host_index: torch.Tensor
    index: torch.Tensor | None
    offsets: torch.Tensor
    offsets_cpu: torch.Tensor
    alpha: AlphaParams
    info: bool

    @classmethod
    def build(cls, batch: ScheduleBatch, host: list[int], kv: StudentKV) -> MixedRows:
        reqs = [batch.reqs[i] for i in host]
        settings = [req.student.alpha for req in reqs]
        device = batch.device
        offsets_cpu, offsets = sent([length_offset(req) for req in reqs], device)
        host_index, index = sent(host, device)
        return cls(
            reqs=[kv.as_student(req) for req in reqs],
            host=host,
            host_index=host_index,
            index=None if len(host) == len(batch.reqs) else index,
            offsets=offsets,
            offsets_cpu=offsets_cpu,
            alpha=AlphaParams.from_lists(
                [s.alpha_method for s in settings],
                [s.alpha_min for s in settings],
                [s.alpha_max for s in settings],
                [0.5 if s.fixed_alpha is None else s.fixed_alpha for s in settings],
                device,
            ),
            info=any(req.student.return_mixing_info for req in reqs),
        )

    def select(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mixed rows of a tensor [B, …]; the tensor itself when all are."""
        return tensor if self.index is None else tensor.index_select(0, self.index)

    def select_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same of a tensor on the host."""
        return tensor if self.index is None else tensor.index_select(0, self.host_index)

    def student_lens(self, batch: ScheduleBatch, ahead: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Lengths of the students' rows [n] in a decode batch, ``ahead`` tokens after its own: on the device, on the
        host (None where the batch has none there)."""
        cpu = batch.seq_lens_cpu
        if cpu is not None:
            cpu = self.select_host(cpu) + self.offsets_cpu + ahead
        return self.select(batch.seq_lens) + self.offsets + ahead, cpu


@dataclasses.dataclass
class DraftRows:
    """The rows of a speculative decode batch.

    Attributes:
        mixed: all mixed rows; None without any. drafted: those that can be drafted for; None without any.
        inner: [n] int64, the drafted ones among the mixed; None when they are the same.
    """

    mixed: MixedRows | None
    drafted: MixedRows | None
    inner: torch.Tensor | None


@dataclasses.dataclass
class DecodePlan:
    """One decode step of the student. seq_lens: [n] including the new token; out_cache_loc: [n] its slots."""

    rows: MixedRows
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    out_cache_loc: torch.Tensor


@dataclasses.dataclass
class PrefillChunk:
    """Tokens [start, end) of one student context; last: the context is complete after it."""

    req: Req
    row: int
    ids: array
    start: int
    end: int
    slots: torch.Tensor
    last: bool


@dataclasses.dataclass
class PrefillPlan:
    """The student contexts that complete with this batch; each piece is one forward.

    after_teacher: whether they read KV that the teacher's forward of this batch writes.
    """

    rows: MixedRows
    pieces: list[list[PrefillChunk]]
    after_teacher: bool


class Planner:
    """Makes the plan of each batch and allocates the student's slots for it, on the scheduler's stream."""

    def __init__(self, kv: StudentKV, chunk_size: int | None):
        self.kv = kv
        self.chunk_size = chunk_size if chunk_size and chunk_size > 0 else None
        self._cached_reqs: list | None = None
        self._cached_rows: MixedRows | None = None

    def plan(self, batch: ScheduleBatch) -> DecodePlan | PrefillPlan | None:
        """The student's part of ``batch``; None when no row of it is mixed."""
        if batch.forward_mode.is_decode():
            return self._decode(batch)
        if batch.forward_mode.is_extend():
            return self._prefill(batch)
        return None

    def _decode(self, batch: ScheduleBatch) -> DecodePlan | None:
        rows = self._decode_rows(batch)
        if rows is None:
            return None
        seq_lens, cpu = rows.student_lens(batch)
        slots = self.kv.decode_slots(rows.select(batch.req_pool_indices), seq_lens)
        return DecodePlan(rows=rows, seq_lens=seq_lens, seq_lens_cpu=cpu, out_cache_loc=slots)

    def _decode_rows(self, batch: ScheduleBatch) -> MixedRows | None:
        # SGLang rebinds batch.reqs whenever the composition changes, so identity of the list is identity of the rows.
        if self._cached_reqs is not batch.reqs:
            host = [i for i, req in enumerate(batch.reqs) if student_of(req) is not None]
            self._cached_rows = MixedRows.build(batch, host, self.kv) if host else None
            self._cached_reqs = batch.reqs
        return self._cached_rows

    def _prefill(self, batch: ScheduleBatch) -> PrefillPlan | None:
        host = []
        for i, req in enumerate(batch.reqs):
            if student_of(req) is None:
                continue
            self.kv.bind(req)
            if req.extend_end == len(req.full_untruncated_fill_ids):
                self.kv.borrow(req)
                host.append(i)
        if not host:
            return None
        rows = MixedRows.build(batch, host, self.kv)
        after_teacher = any(req.student.kv.borrows for req in rows.reqs)
        return PrefillPlan(rows=rows, pieces=self._pieces(rows.reqs), after_teacher=after_teacher)

    def _pieces(self, reqs: list[Req]) -> list[list[PrefillChunk]]:
        limit = self.chunk_size or 1 << 60
        pieces: list[list[PrefillChunk]] = [[]]
        room = limit
        for req in reqs:
            state = req.student.kv
            start, length = state.start, len(state.ids)
            while start < length:
                if room == 0:
                    pieces.append([])
                    room = limit
                end = min(length, start + room)
                slots = state.slots[start - state.start : end - state.start]
                pieces[-1].append(PrefillChunk(req, req.kv.req_pool_idx, state.ids, start, end, slots, end == length))
                room -= end - start
                start = end
            state.forwarded = True
        return pieces
