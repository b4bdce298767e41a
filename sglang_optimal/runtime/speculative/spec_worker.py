"""The speculative worker: the guest drafts k tokens, one forward of the host verifies k + 1 positions.

Every position that is verified is a row of its own in one decode batch: the same request, one token longer than the row
before. A layer writes the KV of all rows before its attention reads any, so each row sees exactly its own past. Any
attention backend that decodes can therefore verify, with the decode graphs it has, and rows may have different numbers
of drafts: a request that cannot be drafted for takes part with one row, as in lockstep.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from sglang_optimal.mixing import Sides, mix
from sglang_optimal.mixing.filters import SamplingFilters
from sglang_optimal.mixing.speculation import verify, verify_greedy
from sglang_optimal.runtime.core import DecodePlan, DraftRows, MixedRows, guest_of
from sglang_optimal.runtime.managers.schedule_batch import as_ordinary_decode, decode_rows, slots_of
from sglang_optimal.runtime.model_executor.guest_failure import guest_failure
from sglang_optimal.runtime.model_executor.host_copy import sent
from sglang_optimal.runtime.sampling.filters import filters_of
from sglang_optimal.runtime.sampling.sampler import MixingStep, make_samplable, token_values
from sglang_optimal.runtime.speculative.adaptive_draft_length import AdaptiveDraftLength, FixedDraftLength
from sglang_optimal.runtime.speculative.draft_input import MixingDraftInput
from sglang_optimal.runtime.speculative.draft_temperature import DraftTemperature
from sglang_optimal.runtime.speculative.step_timer import StepTimer
from sglang_optimal.runtime.speculative.verify import Draft, VerifyOutput

logger = logging.getLogger(__name__)


def can_draft(req: Req) -> bool:
    """Whether more than one token of a request may come from one step.

    A grammar and penalties change with every token, and custom processors may; such requests go on in lockstep.
    """
    params = req.sampling_params
    return (
        guest_of(req) is not None
        and req.grammar is None
        and params.frequency_penalty == 0
        and params.presence_penalty == 0
        and params.repetition_penalty == 1
        and params.min_new_tokens == 0
        and req.custom_logit_processor is None
    )


class MixingSpecWorker(BaseSpecWorker):
    """What SGLang's scheduler runs in place of the host's worker, which it holds."""

    def __init__(self, server_args, gpu_id: int, nccl_port: int, target_worker):
        super().__init__()
        self._target_worker = target_worker
        self.device = target_worker.model_runner.device
        config = target_worker.mixing_config
        self.lengths = FixedDraftLength(config.longest_draft)
        if config.mixing_mode == "auto":
            self.lengths = AdaptiveDraftLength(
                config.longest_draft, StepTimer(self.device), broadcast=self._broadcast_length
            )
        self.temperature = DraftTemperature(self.device)
        self._launched: collections.deque[tuple[int, list[int]]] = collections.deque()
        self._cached: tuple[list, DraftRows] | None = None
        self._too_many = 1 << 60  # positions to verify in one step, for the memory there is

    @property
    def draft_worker(self) -> None:
        """None: the guest's weights and pools belong to the target worker."""
        return None

    @property
    def spec_v2_attn_backends(self) -> tuple:
        """Those whose plans SGLang prepares ahead: both models'."""
        target = self.target_worker
        return target.model_runner.attn_backend, target.guest.model_runner.attn_backend

    # -- steps -----------------------------------------------------------------------------------------------------

    def forward_batch_generation(self, batch: ScheduleBatch, on_publish=None, pp_proxy_tensors=None):
        """One step; ``on_publish`` is told the requests' new lengths as early as they are known."""
        if not batch.forward_mode.is_decode():
            result = self.target_worker.forward_batch_generation(batch)
            return self._finish(batch, result, batch.seq_lens, result.next_token_ids, on_publish)
        rows = self._rows(batch)
        last = batch.spec_info.bonus_tokens.long()
        row_ids = [] if rows.all_drafted is None else rows.drafted.row_ids
        with self.lengths.step(len(row_ids)) if row_ids else contextlib.nullcontext(0) as length:
            if length and len(row_ids) * (length + 1) < self._too_many:
                try:
                    result = self._speculate(batch, rows, last, length, on_publish)
                    self._launched.append((length, row_ids))
                    return result
                except torch.OutOfMemoryError as error:
                    self._without_memory(error, len(row_ids) * (length + 1))
            self._launched.append((0, row_ids))
            return self._lockstep(batch, rows, last, on_publish)

    def _without_memory(self, error: torch.OutOfMemoryError, positions: int) -> None:
        """A step's distributions did not fit beside the models; none so large is tried again.

        Nothing has been published or committed yet, and lockstep writes the same KV once more.
        """
        if get_parallel().tp_size > 1:
            raise error  # the other ranks go on with the step
        self._too_many = positions
        current_platform.empty_cache()
        logger.warning(
            "Not enough memory to verify %d positions in a step; larger steps go on in lockstep from now on. Lower "
            "--mem-fraction-static or --draft-tokens to have them drafted for: %s",
            positions,
            error,
        )

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """The scheduler has the result of the oldest decode step that it has not had yet."""
        length, row_ids = self._launched.popleft()
        if length:
            self.lengths.observe(length, [num_correct_drafts_per_req[i] for i in row_ids])

    def _rows(self, batch: ScheduleBatch) -> DraftRows:
        # As in Planner: the list of requests is a new one whenever it changes.
        if self._cached is None or self._cached[0] is not batch.reqs:
            as_guest = self.target_worker.guest_kv.as_guest
            row_ids = [i for i, req in enumerate(batch.reqs) if guest_of(req) is not None]
            drafted = [i for i in row_ids if can_draft(batch.reqs[i])]
            mixed = MixedRows.build(batch, row_ids, as_guest) if row_ids else None
            if drafted == row_ids:
                rows = DraftRows(mixed, mixed, None)
            else:
                drafted_in_mixed = sent([row_ids.index(i) for i in drafted], batch.device)[1]
                rows = DraftRows(
                    mixed, MixedRows.build(batch, drafted, as_guest) if drafted else None, drafted_in_mixed
                )
            self._cached = batch.reqs, rows
        return self._cached[1]

    def _finish(self, batch, result, new_seq_lens, last, on_publish) -> GenerationBatchResult:
        if on_publish is not None:
            on_publish(new_seq_lens)
        result.new_seq_lens = new_seq_lens
        result.next_draft_input = MixingDraftInput(bonus_tokens=last)
        return result

    def _lockstep(self, batch: ScheduleBatch, rows: DraftRows, last: torch.Tensor, on_publish) -> GenerationBatchResult:
        """One token for each request."""
        batch = as_ordinary_decode(batch, last)
        batch.guest_plan = None if rows.all_mixed is None else self._plan(batch, rows.mixed, 0)
        result = self.target_worker.forward_batch_generation(batch)
        result.accept_lens = torch.ones(len(batch.reqs), dtype=torch.int32, device=batch.device)
        result.speculative_num_draft_tokens = 1
        logprobs = result.logits_output.next_token_logprobs
        if logprobs is not None:
            result.logits_output.next_token_logprobs = logprobs.unsqueeze(1)  # [B, tokens of the step]
        return self._finish(batch, result, batch.seq_lens, result.next_token_ids, on_publish)

    def _plan(self, batch: ScheduleBatch, rows: MixedRows, ahead: int) -> DecodePlan:
        """The guest's decode step ``ahead`` tokens after that of ``batch``, which holds an ordinary decode batch."""
        seq_lens, cpu = rows.guest_lens(batch, ahead)
        pool = self.target_worker.guest_kv.req_to_token_pool
        slots = slots_of(pool, rows.select(batch.req_pool_indices), seq_lens)
        return DecodePlan(rows=rows, seq_lens=seq_lens, seq_lens_cpu=cpu, out_cache_loc=slots)

    def _speculate(
        self, batch: ScheduleBatch, rows: DraftRows, last: torch.Tensor, length: int, on_publish
    ) -> GenerationBatchResult:
        """Up to ``length`` + 1 tokens for each request that can be drafted for, one for the others."""
        batch = as_ordinary_decode(batch, last)
        target, drafted = self.target_worker, rows.drafted
        size, n, width, support = len(batch.reqs), len(drafted.row_ids), length + 1, target.support
        v = support.size
        bias = batch.sampling_info.logit_bias
        bias = None if bias is None else drafted.select(bias)[:, :v]
        filters = filters_of(batch.sampling_info, drafted)

        draft = self._draft(batch, rows, length, self.temperature.sharpened(filters), bias)
        forward = self._verify_forward(batch, drafted, draft.token_ids)
        logits = forward.logits_output.next_token_logits
        lockstep = None if n == size else self._lockstep_tokens(batch, rows, draft, logits[:size])
        teacher = logits if lockstep is None else torch.cat([drafted.select(logits[:size]), logits[size:]])
        teacher = teacher[:, :v]
        if bias is not None:
            teacher = teacher + bias.repeat(width, 1)
        teacher = support.cut(teacher)
        # All n rows at the first position, then at the second, …
        student, filters_everywhere = draft.logits.view(width * n, v), filters.repeat(width)
        temperature = filters_everywhere.temperature
        wanted = rows.mixed.wanted  # of all mixed rows: those in lockstep bring the same columns
        ess_ratio = "ess_ratio" in wanted.series
        mixture = mix(teacher, student, temperature, drafted.alpha.repeat(width), ess_ratio=ess_ratio)
        make_samplable(mixture.logits, mixture)
        support.exclude(mixture.logits)
        if draft.probs is None:
            target_probs = None
            target_token_ids = mixture.logits.argmax(-1).view(width, n)
            token_ids, num_accepted = verify_greedy(target_token_ids, draft.token_ids)
        else:
            target_probs = filters_everywhere.probs(mixture.logits).view(width, n, v)
            if draft.failure is None:
                self.temperature.observe(draft.logits[0], target_probs[0], filters)
            token_ids, num_accepted = verify(target_probs, draft.probs, draft.token_ids)
        token_ids, num_accepted = self._broadcast(token_ids), self._broadcast(num_accepted)

        ids = token_ids.reshape(-1)

        def behaviour() -> torch.Tensor:
            if target_probs is None:  # all rows are greedy
                return torch.zeros_like(mixture.alpha)
            return target_probs.view(width * n, v).gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()

        values = token_values(Sides(mixture, teacher, student, temperature), ids, wanted, behaviour).view(width, n, -1)
        output = VerifyOutput(rows, token_ids, num_accepted, values, mixture.logits.view(width, n, v))
        observer = target.model_runner.sampling_observer
        if observer.on_sides is not None:
            output.show(observer.on_sides, teacher.view(width, n, v), draft.logits)
        result = output.result(batch, lockstep, observer, draft.failure)
        result.can_run_cuda_graph = forward.can_run_graph
        lens = result.accept_lens
        last = result.next_token_ids.view(size, width).gather(1, (lens - 1).long().unsqueeze(1)).squeeze(1)
        return self._finish(batch, result, batch.seq_lens - 1 + lens, last, on_publish)

    @contextlib.contextmanager
    def always_drafting(self) -> Iterator[None]:
        """Within, each step drafts as much as one may; what that shows of lengths and temperatures is forgotten."""
        lengths, temperature = self.lengths, self.temperature
        self.lengths = FixedDraftLength(self.target_worker.mixing_config.longest_draft)
        self.temperature = DraftTemperature(self.device)
        try:
            yield
        finally:
            self.lengths, self.temperature = lengths, temperature

    # -- parts of a step -------------------------------------------------------------------------------------------

    def _draft(
        self, batch: ScheduleBatch, rows: DraftRows, length: int, filters: SamplingFilters, bias: torch.Tensor | None
    ) -> Draft:
        """``length`` + 1 forwards of the guest, each on what it drew from the one before."""
        target, drafted = self.target_worker, rows.drafted
        n, support = len(drafted.row_ids), target.support
        v = support.size
        draft = Draft.empty(length, n, v, batch.device, greedy=filters.greedy)
        try:
            for ahead in range(length + 1):
                # The first forward has the rows that are not drafted for as well.
                part = rows.mixed if ahead == 0 else drafted
                ids = part.select(batch.input_ids) if ahead == 0 else draft.token_ids[ahead - 1]
                logits = target.guest.forward_decode(batch, self._plan(batch, part, ahead), ids, view=True)
                if ahead == 0 and rows.drafted_in_mixed is not None:
                    draft.lockstep_logits = logits.clone()
                    logits = logits.index_select(0, rows.drafted_in_mixed)
                draft.logits[ahead] = logits[:, :v] if bias is None else logits[:, :v] + bias
                support.cut(draft.logits[ahead])
                if ahead < length:
                    draft.token_ids[ahead] = self._broadcast(draft.propose(ahead, filters))
        except torch.OutOfMemoryError:
            raise  # the step may go on in lockstep
        except Exception as error:
            draft.failure = guest_failure(error, rows.mixed)
            draft.fill_invalid(len(rows.mixed.row_ids))
        return draft

    def _verify_forward(self, batch: ScheduleBatch, drafted: MixedRows, draft_token_ids: torch.Tensor):
        """The host's forward of all rows of ``batch``, then of the drafted rows once for each draft [k, n]."""
        k, n = draft_token_ids.shape
        req_pool_indices = torch.cat([batch.req_pool_indices, drafted.select(batch.req_pool_indices).repeat(k)])
        seq_lens = torch.cat([batch.seq_lens, _ahead(drafted.select(batch.seq_lens), k)])
        cpu = batch.seq_lens_cpu
        part = decode_rows(
            batch,
            [*batch.reqs, *[batch.reqs[i] for i in drafted.row_ids] * k],
            input_ids=torch.cat([batch.input_ids, draft_token_ids.reshape(-1)]),
            req_pool_indices=req_pool_indices,
            seq_lens=seq_lens,
            seq_lens_cpu=None if cpu is None else torch.cat([cpu, _ahead(drafted.select_cpu(cpu), k)]),
            out_cache_loc=slots_of(batch.req_to_token_pool, req_pool_indices, seq_lens),
        )
        runner = self.target_worker.model_runner
        return runner.forward(ForwardBatch.init_new(part, runner, return_hidden_states_before_norm=False))

    def _lockstep_tokens(
        self, batch: ScheduleBatch, rows: DraftRows, draft: Draft, logits: torch.Tensor
    ) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        """What lockstep samples for all requests: the tokens [B] of those that are not drafted for, and more of them.

        Args:
            logits: [B, V] the host's, which stay as they are.
        """
        runner, info = self.target_worker.model_runner, batch.sampling_info
        info.mixing = None
        if rows.drafted_in_mixed is not None:  # else only plain requests are left
            logits_of_all = draft.lockstep_logits
            info.mixing = MixingStep(rows.mixed, logits_of_all, self.target_worker.support, failure=draft.failure)
        output = LogitsProcessorOutput(next_token_logits=logits.clone())
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        return runner.sample(output, forward_batch), output

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The first rank's, on every rank."""
        group = get_parallel().tp_group
        return group.broadcast(values, src=0) if group.world_size > 1 else values

    @staticmethod
    def _broadcast_length(length: int) -> int:
        """The first rank's choice, on every rank."""
        group = get_parallel().tp_group
        if group.world_size > 1:
            choice = torch.tensor(length)
            torch.distributed.broadcast(choice, src=group.ranks[0], group=group.cpu_group)
            return int(choice)
        return length


def _ahead(seq_lens: torch.Tensor, k: int) -> torch.Tensor:
    """[k · n] the lengths [n] with one token more, with two, … with k."""
    more = torch.arange(1, k + 1, device=seq_lens.device, dtype=seq_lens.dtype)
    return (seq_lens + more.unsqueeze(1)).view(-1)
