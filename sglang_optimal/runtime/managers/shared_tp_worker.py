"""The scheduler's model worker where host and guest are one model: both contexts are rows of one forward."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput
from sglang.srt.runtime_context import get_model, get_parallel

from sglang_optimal.config import MixingConfig
from sglang_optimal.platforms.torch_cpu import ignore_pinned_memory
from sglang_optimal.runtime.configs.model_config import is_recurrent
from sglang_optimal.runtime.core import DecodePlan, PrefillPlan
from sglang_optimal.runtime.lora.student_adapter import StudentAdapter
from sglang_optimal.runtime.managers.guest_tp_worker import kept
from sglang_optimal.runtime.managers.schedule_batch import (
    decode_part,
    joined,
    prefill_micro_batches,
    prefill_part,
    rows_of,
)
from sglang_optimal.runtime.managers.tp_worker import MixedTpModelWorker
from sglang_optimal.runtime.mem_cache.guest_kv import GuestReqToTokenPool, SharedGuestKV
from sglang_optimal.runtime.mem_cache.kv_cache_configurator import count_guest_states
from sglang_optimal.runtime.model_executor.weight_updater import UpdatedModel
from sglang_optimal.runtime.sampling.sampler import MixingStep
from sglang_optimal.runtime.sampling.scoring import take_guest_states
from sglang_optimal.runtime.sampling.support import Support

logger = logging.getLogger(__name__)


class SharedTpModelWorker(MixedTpModelWorker):
    """SGLang's worker, whose forward takes a mixed request's two contexts as two rows.

    The scheduler knows one row. The other is added just before the forward, and its logits are taken off just after it,
    so that sampling sees the batch that was scheduled.
    """

    rows_per_request = 2

    def __init__(self, config: MixingConfig, **worker_kwargs):
        if config.student_lora_path is not None and not torch.accelerator.is_available():
            ignore_pinned_memory()
        super().__init__(config, **worker_kwargs)

    def init_guest(self, **worker_kwargs) -> None:
        adapter = self.mixing_config.student_lora_path
        self.adapter = None if adapter is None else StudentAdapter(adapter)
        self.support = Support(self.model_config.vocab_size)
        self._chunk_size = worker_kwargs["server_args"].chunked_prefill_size
        self._pending: tuple[ScheduleBatch, MixingStep] | None = None
        self._forward_one = self.model_runner.forward
        self.model_runner.forward = self._forward

    @property
    def guest_runner(self) -> ModelRunner:
        return self.model_runner

    @functools.cached_property
    def _model(self) -> UpdatedModel:
        return self._updated("model", self.model_runner, get_model().model_path, get_model().revision)

    @property
    def updated_models(self) -> list[UpdatedModel]:
        """The one model, unless the policy is the adapter alone."""
        return [] if self.mixing_config.updated == "student" else [self._model]

    # -- memory ----------------------------------------------------------------------------------------------------

    def alloc_memory_pool(self, *args, **kwargs) -> None:
        """SGLang's, with a second table of rows behind the first."""
        runner = self.model_runner
        wire_components = runner._init_post_memory_pool_components

        def with_guest_rows() -> None:
            self._rows = GuestReqToTokenPool(runner.req_to_token_pool)
            wire_components()

        runner._init_post_memory_pool_components = with_guest_rows
        if is_recurrent(self.model_config):
            count_guest_states(runner)
        super().alloc_memory_pool(*args, **kwargs)
        self._pools_are_there(SharedGuestKV(self._rows, runner.token_to_kv_pool_allocator, self.adapter))
        if get_parallel().tp_rank == 0:
            logger.info("KV pool: %d tokens for both contexts (shared weights)", runner.max_total_num_tokens)

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward_batch_generation(self, batch: ScheduleBatch | None, *args, **kwargs):
        """SGLang's; its forward adds the guest's rows that are noted here."""
        if batch is not None and batch.sampling_info is not None:
            plan = getattr(batch, "guest_plan", None)
            step = None if plan is None else MixingStep(plan.rows, None, self.support)
            batch.sampling_info.mixing = step
            self._pending = None if step is None else (batch, step)
            return self._scored(batch, step, super().forward_batch_generation, *args, **kwargs)
        return super().forward_batch_generation(batch, *args, **kwargs)

    def _forward(self, forward_batch: ForwardBatch, *args, **kwargs) -> ModelRunnerOutput:
        """In place of ``ModelRunner.forward``: what it gives for the scheduled rows; the guest's logits are kept.

        Where the guest's part fails, their requests end and the scheduled rows are forwarded alone.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return self._forward_one(forward_batch, *args, **kwargs)
        batch, step = pending
        plan = batch.guest_plan
        if isinstance(plan, PrefillPlan) and plan.after_host:
            output = self._forward_one(forward_batch, *args, **kwargs)
            output.logits_output = kept(output)
            with self._ending_guests(step, batch):
                step.guest_logits = prefill_micro_batches(batch, plan, self._output, self._rows.offset)
            return output
        with self._ending_guests(step, batch):
            part = self._part_beside(batch, plan)
            if part is not None:
                return self._forward_both(batch, plan, part, step)
            step.guest_logits = prefill_micro_batches(batch, plan, self._output, self._rows.offset)
        if self.model_runner.lora_manager is not None:  # which now knows the guest's rows
            self.model_runner.lora_manager.prepare_lora_batch(forward_batch)
        return self._forward_one(forward_batch, *args, **kwargs)

    def _forward_both(
        self, batch: ScheduleBatch, plan: DecodePlan | PrefillPlan, part: ScheduleBatch, step: MixingStep
    ) -> ModelRunnerOutput:
        """One forward of the scheduled rows and the guest's; returns the former's part of what it gave."""
        output = self._forward_one(self._forward_batch(joined(batch, part)))
        logits = output.logits_output.next_token_logits
        scheduled = rows_of(batch)
        if len(logits) != scheduled + rows_of(part):  # else somebody would get another's
            raise RuntimeError(f"{len(logits)} rows of logits for {scheduled} and {rows_of(part)} of the batch")
        step.guest_logits = logits[scheduled:]
        output.logits_output.next_token_logits = logits[:scheduled]
        hidden = output.logits_output.hidden_states
        if hidden is not None and isinstance(plan, PrefillPlan):
            output.logits_output.hidden_states = hidden[: batch.extend_num_tokens]
            take_guest_states(plan.micro_batches[0], hidden[batch.extend_num_tokens :])
        return output

    @contextlib.contextmanager
    def _ending_guests(self, step: MixingStep, batch: ScheduleBatch) -> Iterator[None]:
        """What is raised within ends the mixed requests of the step, and nothing else."""
        try:
            yield
        except Exception as error:
            self._failed(step, error, batch.device)

    def _part_beside(self, batch: ScheduleBatch, plan: DecodePlan | PrefillPlan) -> ScheduleBatch | None:
        """The guest's rows for the same forward; None where they need forwards of their own."""
        if isinstance(plan, DecodePlan):
            return decode_part(batch, plan, self._rows.offset)
        if batch.return_logprob or len(plan.micro_batches) != 1 or _reads_embeddings(batch):
            return None
        part = prefill_part(batch, plan.micro_batches[0], self._rows.offset)
        limit = self._chunk_size
        if limit and limit > 0 and part.extend_num_tokens + batch.extend_num_tokens > limit:
            return None
        return part

    def _forward_batch(self, batch: ScheduleBatch) -> ForwardBatch:
        return ForwardBatch.init_new(batch, self.model_runner, return_hidden_states_before_norm=False)

    def _output(self, part: ScheduleBatch) -> LogitsProcessorOutput:
        return kept(self._forward_one(self._forward_batch(part)))


def _reads_embeddings(batch: ScheduleBatch) -> bool:
    """Whether a plain request of a prefill batch brings more than token ids: embeddings, images."""
    given = batch.input_embeds is not None or batch.replace_embeds is not None
    return given or any(images is not None for images in batch.multimodal_inputs or ())
