"""The scheduler's model worker where student and teacher are one model: both contexts are rows of one forward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunnerOutput
from sglang.srt.runtime_context import get_parallel

from sglang_optimal.config import MixingConfig
from sglang_optimal.platforms.torch_cpu import ignore_pinned_memory
from sglang_optimal.runtime.core import DecodePlan, PrefillPlan
from sglang_optimal.runtime.launch import STUDENT_ADAPTER
from sglang_optimal.runtime.managers.schedule_batch import decode_part, joined, prefill_part, prefill_pieces, rows_of
from sglang_optimal.runtime.managers.student_tp_worker import kept
from sglang_optimal.runtime.mem_cache.student_kv import SharedStudentKV, StudentRows
from sglang_optimal.runtime.model_executor.graph_runners import prepare_graphs
from sglang_optimal.runtime.model_executor.row_room import room_for_rows
from sglang_optimal.runtime.model_executor.student_failure import no_logits, student_failure
from sglang_optimal.runtime.sampling import sampler
from sglang_optimal.runtime.sampling.sampler import MixingStep
from sglang_optimal.runtime.sampling.sampling_observer import MixingObserver

logger = logging.getLogger(__name__)


class SharedTpWorker(TpModelWorker):
    """SGLang's worker, whose forward takes a mixed request's two contexts as two rows.

    The scheduler knows one row. The other is added just before the forward, and its logits are taken off just after it,
    so that sampling sees the batch that was scheduled.
    """

    def __init__(self, config: MixingConfig, **worker_kwargs):
        if config.student_lora_path is not None and not torch.accelerator.is_available():
            ignore_pinned_memory()
        with sampler.beside_a_student():
            super().__init__(**worker_kwargs)
            sampler.install(self.model_runner)
        self.student = SharedStudent(self)
        self.student_kv: SharedStudentKV | None = None
        self._lora_id = None
        if config.student_lora_path is not None:
            self._lora_id = LoRARef.deterministic_id(STUDENT_ADAPTER, config.student_lora_path)
        self.vocab_size = self.model_config.vocab_size
        self._chunk_size = worker_kwargs["server_args"].chunked_prefill_size
        self._pending: tuple[ScheduleBatch, MixingStep] | None = None
        self._forward_one = self.model_runner.forward
        self.model_runner.forward = self._forward

    # -- memory ----------------------------------------------------------------------------------------------------

    def alloc_memory_pool(self, *args, **kwargs) -> None:
        runner = self.model_runner
        wire_components = runner._init_post_memory_pool_components

        def with_student_rows() -> None:
            self._rows = StudentRows(runner.req_to_token_pool)
            wire_components()

        runner._init_post_memory_pool_components = with_student_rows
        super().alloc_memory_pool(*args, **kwargs)
        self.student_kv = SharedStudentKV(self._rows, runner.token_to_kv_pool_allocator, self._lora_id)
        runner.sampling_observer = MixingObserver()
        if get_parallel().tp_rank == 0:
            logger.info("KV pool: %d tokens for both contexts (shared weights)", runner.max_total_num_tokens)

    def init_attention_backends(self) -> None:
        with room_for_rows(self.model_runner, 2):
            super().init_attention_backends()

    def init_cuda_graphs(self, capture_decode_cuda_graph: bool = True) -> None:
        with room_for_rows(self.model_runner, 2):
            super().init_cuda_graphs(capture_decode_cuda_graph)
        prepare_graphs(self.model_runner, 2)

    @property
    def student_runner(self):
        """The student's model runner: the teacher's."""
        return self.model_runner

    @property
    def student_context_len(self) -> int:
        return self.model_config.context_len

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward_batch_generation(self, batch: ScheduleBatch | None, *args, **kwargs):
        if batch is not None and batch.sampling_info is not None:
            plan = getattr(batch, "student_plan", None)
            step = None if plan is None else MixingStep(plan.rows, None, self.vocab_size)
            batch.sampling_info.mixing = step
            self._pending = None if step is None else (batch, step)
        return super().forward_batch_generation(batch, *args, **kwargs)

    def _forward(self, forward_batch: ForwardBatch, *args, **kwargs) -> ModelRunnerOutput:
        """In place of ``ModelRunner.forward``: what it gives for the scheduled rows; the students' logits are kept.

        Where the students' part fails, their requests end and the scheduled rows are forwarded alone.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return self._forward_one(forward_batch, *args, **kwargs)
        batch, step = pending
        plan = batch.student_plan
        if isinstance(plan, PrefillPlan) and plan.after_teacher:
            output = self._forward_one(forward_batch, *args, **kwargs)
            output.logits_output = kept(output)
            with self._ending_students(step, batch):
                step.student_logits = prefill_pieces(batch, plan, self._logits, self._rows.offset)
            return output
        with self._ending_students(step, batch):
            part = self._part_beside(batch, plan)
            if part is not None:
                return self._forward_both(batch, part, step)
            step.student_logits = prefill_pieces(batch, plan, self._logits, self._rows.offset)
        if self.model_runner.lora_manager is not None:  # which now knows the students' rows
            self.model_runner.lora_manager.prepare_lora_batch(forward_batch)
        return self._forward_one(forward_batch, *args, **kwargs)

    def _forward_both(self, batch: ScheduleBatch, part: ScheduleBatch, step: MixingStep) -> ModelRunnerOutput:
        """One forward of the scheduled rows and the students'; returns the former's part of what it gave."""
        output = self._forward_one(self._forward_batch(joined(batch, part)))
        logits = output.logits_output.next_token_logits
        scheduled = rows_of(batch)
        if len(logits) != scheduled + rows_of(part):  # else somebody would get another's
            raise RuntimeError(f"{len(logits)} rows of logits for {scheduled} and {rows_of(part)} of the batch")
        step.student_logits = logits[scheduled:]
        output.logits_output.next_token_logits = logits[:scheduled]
        return output

    @contextlib.contextmanager
    def _ending_students(self, step: MixingStep, batch: ScheduleBatch) -> Iterator[None]:
        """What is raised within ends the mixed requests of the step, and nothing else."""
        try:
            yield
        except Exception as error:
            step.failure = student_failure(error, step.rows)
            step.student_logits = no_logits(step.rows, self.vocab_size, batch.device)

    def _part_beside(self, batch: ScheduleBatch, plan: DecodePlan | PrefillPlan) -> ScheduleBatch | None:
        """The students' rows for the same forward; None where they need forwards of their own."""
        if isinstance(plan, DecodePlan):
            return decode_part(batch, plan, self._rows.offset)
        if batch.return_logprob or len(plan.pieces) != 1:
            return None
        part = prefill_part(batch, plan.pieces[0], self._rows.offset)
        limit = self._chunk_size
        if limit and limit > 0 and part.extend_num_tokens + batch.extend_num_tokens > limit:
            return None
        return part

    def _forward_batch(self, batch: ScheduleBatch) -> ForwardBatch:
        return ForwardBatch.init_new(batch, self.model_runner, return_hidden_states_before_norm=False)

    def _logits(self, part: ScheduleBatch) -> torch.Tensor:
        return kept(self._forward_one(self._forward_batch(part))).next_token_logits


class SharedStudent:
    """What the scheduler asks of a student, where it is the teacher itself."""

    def __init__(self, worker: SharedTpWorker):
        self._worker = worker
        self.weight_version: str | None = None

    @property
    def weights_path(self) -> str:
        return self._worker.model_config.model_path

    def update_weights_from_disk(self, request: UpdateWeightFromDiskReqInput) -> tuple[bool, str]:
        """Refused: it would change the teacher."""
        return False, (
            "the student shares the teacher's weights; start the server with --student-weights separate to update it."
        )
