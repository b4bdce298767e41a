"""What rides on SGLang's objects: the state of a mixed request, and a batch's part for the guest.

- ``Req.mixing``: a `MixedRequest`; None for a plain request. Set by the scheduler when the request arrives, and dies
  with it.
- ``Req.mixing.guest.kv``: a `GuestKVState`. Set by `GuestKV.allocate` when the request is admitted; dies at its
  finish, abort or retraction, when the slots are given back.
- ``ScheduleBatch.guest_plan``: a `PrefillPlan` or `DecodePlan`. Set before a forward by the scheduler or, where the
  guest drafts, by the speculative worker; a forward's result keeps it alive until the device has read it.
- ``ScheduleBatch.spec_info``: a `MixingDraftInput` (speculative/draft_input.py). What one step with drafts leaves to
  the next, which reads it.
- ``SamplingBatchInfo.mixing``: a `MixingStep` (sampling/sampler.py); None without mixed rows. Set by the worker before
  its forward; dies with the step.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

from sglang_optimal.config import AlphaSettings
from sglang_optimal.mixing import AlphaParams
from sglang_optimal.runtime.model_executor.host_copy import sent
from sglang_optimal.wanted import Wanted

Of = TypeVar("Of")


@dataclasses.dataclass
class Side:
    """One model's part in a mixed request.

    Attributes:
        model: ``teacher`` or ``student``.
        prompt_ids: token ids of its prompt; each model reads its own and then the output tokens.
        kv: its KV slots, where they are not SGLang's own (``Req.kv``, the host's); None while it holds none.
    """

    model: str
    prompt_ids: array
    kv: GuestKVState | None = None


@dataclasses.dataclass
class Score:
    """A completion to score: the last tokens of both sides' prompts.

    Attributes:
        length: of the completion.
        host, guest: hidden states [n, H] of the positions before its tokens, part by part. Set by the workers'
            prefills (sampling/scoring.py); they die when both sides are complete and the scores are made.
    """

    length: int
    host: list[torch.Tensor] = dataclasses.field(default_factory=list)
    guest: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class MixedRequest:
    """What is mixed for one request.

    Attributes:
        sides: the models with their contexts; two, the host's first. The teacher's weight α and the student's 1 − α are
            solved for every token.
        alpha: how.
        wanted: what the client asked for.
        score: the completion that is scored; None where one is generated.
    """

    sides: list[Side]
    alpha: AlphaSettings
    wanted: Wanted = Wanted()
    score: Score | None = None

    @property
    def host(self) -> Side:
        return self.sides[0]

    def by_role(self, host: Of, guest: Of) -> tuple[Of, Of]:
        """(the teacher's, the student's) of what both models have; the same way round in all requests of a server."""
        return (guest, host) if self.host.model == "student" else (host, guest)

    @property
    def guest(self) -> Side:
        return self.sides[1]


@dataclasses.dataclass
class GuestKVState:
    """What one request holds in the guest's pool.

    Attributes:
        ids: the tokens to prefill: G + the output tokens so far (more than G only after a retraction).
        prefix_len: how many of them the radix cache had.
        start: where the guest's own prefill begins; [prefix_len, start) is the host's to compute, whose context
            begins with the same tokens, and the row points to its slots (shared weights only).
        node, lock: the matched tree node and the lock on it.
        slots: [len(ids) − start] KV slots for the rest.
        recurrent: [1] int64 slot of the recurrent layers' state; None without such layers.
        protected_len: [0, protected_len) of the row is not the guest's own: the tree's, or the host's.
        reserved: slots of the row beyond its prompt that were taken ahead of the tokens (speculative steps only).
        aliases_host: whether part of it is still the host's.
        bound: whether the row is written. forwarded: whether the prefill was launched.
        failed: a forward failed; what the slots hold must not enter the radix cache.
    """

    ids: array
    prefix_len: int
    start: int
    node: object
    lock: object
    slots: torch.Tensor | None = None
    recurrent: torch.Tensor | None = None
    protected_len: int = 0
    reserved: int = 0
    aliases_host: bool = False
    bound: bool = False
    forwarded: bool = False
    failed: bool = False

    @property
    def extend_len(self) -> int:
        return len(self.ids) - self.start


def guest_of(req: Req) -> Side | None:
    """The guest's side of the request, or None for a plain request."""
    mixing: MixedRequest | None = getattr(req, "mixing", None)
    return None if mixing is None else mixing.guest


def length_offset(req: Req) -> int:
    """``len(G) − len(H)``: guest length minus host length, the same at every step."""
    return len(req.mixing.guest.prompt_ids) - len(req.origin_input_ids)


def alpha_params(settings: Sequence[AlphaSettings], device: torch.device | str) -> AlphaParams:
    """How alpha is solved in rows with these settings."""
    budgets = [s.budget for s in settings]
    return AlphaParams.from_lists(
        [s.alpha_method for s in settings],
        [s.alpha_min for s in settings],
        [s.alpha_max for s in settings],
        [0.5 if s.fixed_alpha is None else s.fixed_alpha for s in settings],
        device,
        kl_budget=[b or 0.0 for b in budgets] if any(b is not None for b in budgets) else None,
    )


@dataclasses.dataclass
class MixedRows:
    """The mixed rows of a batch and their settings; unchanged from step to step while the batch has the same requests.

    Attributes:
        reqs: the requests, as the guest's forward sees them.
        row_ids: numbers of the rows in the batch. row_ids_cpu: the same as a tensor, [n] int64 on the CPU.
        device_row_ids: the same on the device, or None when every row is mixed.
        offsets, offsets_cpu: [n] int64, guest length minus host length.
        alpha: per-row settings.
        wanted: what any row asked for.
        host_is_student: whose the host's logits are; of the server, and so of all rows.
    """

    reqs: list[Req]
    row_ids: list[int]
    row_ids_cpu: torch.Tensor
    device_row_ids: torch.Tensor | None
    offsets: torch.Tensor
    offsets_cpu: torch.Tensor
    alpha: AlphaParams
    wanted: Wanted
    host_is_student: bool = False

    @classmethod
    def build(cls, batch: ScheduleBatch, row_ids: list[int], as_guest: Callable[[Req], Req]) -> MixedRows:
        """The rows ``row_ids`` of ``batch``; ``as_guest``: how the guest's forward sees a request."""
        reqs = [batch.reqs[i] for i in row_ids]
        settings = [req.mixing.alpha for req in reqs]
        device = batch.device
        offsets_cpu, offsets = sent([length_offset(req) for req in reqs], device)
        row_ids_cpu, device_row_ids = sent(row_ids, device)
        return cls(
            reqs=[as_guest(req) for req in reqs],
            row_ids=row_ids,
            row_ids_cpu=row_ids_cpu,
            device_row_ids=None if len(row_ids) == len(batch.reqs) else device_row_ids,
            offsets=offsets,
            offsets_cpu=offsets_cpu,
            alpha=alpha_params(settings, device),
            wanted=Wanted.by_all(req.mixing.wanted for req in reqs),
            host_is_student=reqs[0].mixing.host.model == "student",
        )

    def by_role(self, host: Of, guest: Of) -> tuple[Of, Of]:
        """(the teacher's, the student's) of what both models have."""
        return (guest, host) if self.host_is_student else (host, guest)

    def select(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mixed rows of a tensor [B, …]; the tensor itself when all are."""
        return tensor if self.device_row_ids is None else tensor.index_select(0, self.device_row_ids)

    def select_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same of a tensor on the CPU."""
        return tensor if self.device_row_ids is None else tensor.index_select(0, self.row_ids_cpu)

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Write ``values`` [n, …] into the mixed rows of a tensor [B, …], in place; returns it."""
        if self.device_row_ids is None:
            return tensor.copy_(values)
        return tensor.index_copy_(0, self.device_row_ids, values)

    def guest_lens(self, batch: ScheduleBatch, ahead: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Lengths of the guest's rows [n] in a decode batch, ``ahead`` tokens after its own: on the device, on the
        host (None where the batch has none there)."""
        cpu = batch.seq_lens_cpu
        if cpu is not None:
            cpu = self.select_cpu(cpu) + self.offsets_cpu + ahead
        return self.select(batch.seq_lens) + self.offsets + ahead, cpu


@dataclasses.dataclass
class DraftRows:
    """The rows of a speculative decode batch.

    Attributes:
        all_mixed: all mixed rows; None without any. all_drafted: those that can be drafted for; None without any.
        drafted_in_mixed: [n] int64, the drafted ones among the mixed; None when they are the same.
    """

    all_mixed: MixedRows | None
    all_drafted: MixedRows | None
    drafted_in_mixed: torch.Tensor | None

    @property
    def mixed(self) -> MixedRows:
        """All mixed rows.

        Raises:
            RuntimeError: there are none.
        """
        if self.all_mixed is None:
            raise RuntimeError("no row of the batch is mixed")
        return self.all_mixed

    @property
    def drafted(self) -> MixedRows:
        """Those that can be drafted for.

        Raises:
            RuntimeError: there are none.
        """
        if self.all_drafted is None:
            raise RuntimeError("no row of the batch can be drafted for")
        return self.all_drafted


@dataclasses.dataclass
class DecodePlan:
    """One decode step of the guest.

    Attributes:
        seq_lens: [n] including the new token; seq_lens_cpu: the same on the CPU, None where the batch has none there.
        out_cache_loc: [n] the new token's slots.
    """

    rows: MixedRows
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    out_cache_loc: torch.Tensor


@dataclasses.dataclass
class PrefillChunk:
    """Tokens [start, end) of one guest context; last: the context is complete after it.

    recurrent: as in `GuestKVState`.
    """

    req: Req
    req_pool_idx: int
    ids: array
    start: int
    end: int
    slots: torch.Tensor
    last: bool
    recurrent: torch.Tensor | None = None


@dataclasses.dataclass
class PrefillPlan:
    """The guest contexts that complete with this batch; each micro batch is one forward.

    after_host: whether they read KV that the host's forward of this batch writes.
    """

    rows: MixedRows
    micro_batches: list[list[PrefillChunk]]
    after_host: bool
