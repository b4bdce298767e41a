"""The scheduler subclass: one admission, one batch, one finish for both contexts of a mixed request."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
)
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode, page_aligned_decode_alloc_lens
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_device, get_serving

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime import registry, releases
from sglang_optimal.runtime.core import guest_of
from sglang_optimal.runtime.entrypoints.protocol import from_wire
from sglang_optimal.runtime.lora.student_adapter import OLD_ADAPTER
from sglang_optimal.runtime.managers.schedule_batch import Planner
from sglang_optimal.runtime.managers.schedule_policy import MixedPrefillAdder
from sglang_optimal.runtime.managers.scheduler_components.invariant_checker import MixedSchedulerInvariantChecker
from sglang_optimal.runtime.managers.scheduler_components.weight_updater import MixedSchedulerWeightUpdaterManager
from sglang_optimal.runtime.managers.self_check import SelfCheck, SelfCheckError
from sglang_optimal.runtime.managers.shared_tp_worker import SharedTpModelWorker
from sglang_optimal.runtime.managers.tp_worker import MixedTpModelWorker, SeparateTpModelWorker
from sglang_optimal.runtime.model_executor.weight_updater import HELD
from sglang_optimal.runtime.sampling.scoring import score_of

logger = logging.getLogger(__name__)


class MixedScheduler(Scheduler):
    """SGLang's scheduler with a guest worker.

    Args:
        mixing_config: the student and the defaults.
    """

    tp_worker: MixedTpModelWorker
    # SGLang's, which sets them in a method.
    invariant_checker: SchedulerInvariantChecker
    weight_updater: MixedSchedulerWeightUpdaterManager

    def __init__(self, *args, mixing_config: MixingConfig, **kwargs):
        self.mixing_config = mixing_config
        super().__init__(*args, **kwargs)
        self.self_check_report: dict[str, float | int] | None = None
        if self.mixing_config.checks_itself(torch.accelerator.is_available()):
            self.check_itself()

    def check_itself(self) -> None:
        """Compare what the mixing sees with what each model gives alone; on an idle scheduler.

        Raises:
            SystemExit: with status 2 where they differ; the reason is printed.
        """
        try:
            self.self_check_report = SelfCheck(self).run()
        except SelfCheckError as error:
            print(f"sglang_optimal: error: self-check: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        logger.info("Self-check: both sides' logits are right: %s", self.self_check_report)

    def init_tp_model_worker(self) -> None:
        """The worker with a guest, in place of SGLang's."""
        worker_class = SharedTpModelWorker if self.mixing_config.shared_weights else SeparateTpModelWorker
        self.tp_worker = worker_class(
            self.mixing_config, server_args=self.server_args, gpu_id=get_device().gpu_id, nccl_port=self.nccl_port
        )

    def init_chunked_prefill(self) -> None:
        """SGLang's, and the planner of the guest's part."""
        super().init_chunked_prefill()
        self.guest_planner = Planner(self.tp_worker.guest_kv, self.chunked_prefill_size)

    def init_metrics_reporter(self) -> None:
        """SGLang's, and the metrics of mixing beside them."""
        super().init_metrics_reporter()
        self.mixing_metrics = None
        context = self.metrics_reporter.metrics_collector_context
        if context.current_scheduler_metrics_enabled:
            from sglang_optimal.runtime.observability.metrics_collector import MixingMetrics

            observer = self.tp_worker.model_runner.sampling_observer
            self.mixing_metrics = MixingMetrics(
                context.collector.labels, self.tp_worker.guest_kv, observer.equal_sides, self.mixing_config.guest
            )
            observer.on_tokens = self.mixing_metrics.observe

    def init_weight_updater(self) -> None:
        """SGLang's, for the policy."""
        super().init_weight_updater()
        self.weight_updater = MixedSchedulerWeightUpdaterManager.like(self.weight_updater, self.mixing_config)

    def load_lora_adapter(self, recv_req: LoadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """SGLang's; beside a student that is an adapter, another one in its place."""
        return self._exchange_adapter(recv_req) or super().load_lora_adapter(recv_req)

    def load_lora_adapter_from_tensors(self, recv_req: LoadLoRAAdapterFromTensorsReqInput) -> LoRAUpdateOutput:
        """SGLang's; beside a student that is an adapter, another one in its place."""
        return self._exchange_adapter(recv_req) or super().load_lora_adapter_from_tensors(recv_req)

    def _exchange_adapter(self, recv_req: Any) -> LoRAUpdateOutput | None:
        adapter = getattr(self.tp_worker, "adapter", None)
        if adapter is None:
            return None
        # A plain request that asks for the adapter has its id already.
        waits = any(req.lora_id == adapter.lora_id for req in self.waiting_queue)
        if waits or not self.is_fully_idle(ignore_waiting=self._engine_paused):
            message = f"{HELD}. Let them finish, or abort or retract them. {OLD_ADAPTER}"
            return LoRAUpdateOutput(success=False, error_message=message)
        return adapter.exchange(self.tp_worker, recv_req)

    def init_invariant_checker(self) -> None:
        """SGLang's, which counts the guest's slots as well."""
        super().init_invariant_checker()
        self.invariant_checker = MixedSchedulerInvariantChecker.like(self.invariant_checker, self.tp_worker.guest_kv)

    def get_prefill_adder_class(self) -> type[PrefillAdder]:
        """The one that asks for room on both sides."""
        return MixedPrefillAdder

    def _create_generation_req(self, recv_req, *args, **kwargs) -> Req:
        """SGLang's request, with the guest's side."""
        req = super()._create_generation_req(recv_req, *args, **kwargs)
        self.on_created(req)
        return req

    def on_created(self, req: Req) -> None:
        """Give a new request its guest's side, once."""
        req.mixing = from_wire(req.sampling_params.custom_params, req.origin_input_ids)
        if req.mixing is not None:
            req.eos_token_ids = self.tp_worker.eos_token_ids
        for model in self.tp_worker.updated_models:
            if not model.whole:
                req.set_finish_with_abort(model.words_of_the_old())
        if req.mixing is not None and self.mixing_metrics is not None:
            self.mixing_metrics.requests.inc()

    def init_req_max_new_tokens(self, req: Req) -> None:
        """SGLang's limit of a request's length, lowered to what the guest's context and pool allow."""
        if not releases.CREATES_BY_A_METHOD and not hasattr(req, "mixing"):
            self.on_created(req)
        super().init_req_max_new_tokens(req)
        # Slots that a speculative step takes ahead, beyond the one for the next token.
        ahead = get_alloc_reserve_per_decode() - 1 if self.mixing_config.longest_draft else 0
        if ahead:
            pool = self.token_to_kv_pool_allocator
            room = pool.size - pool.page_size - ahead - len(req.origin_input_ids)
            if room < 1:
                req.set_finish_with_abort(
                    f"context too long: {len(req.origin_input_ids)} tokens and the {ahead + 1} that a speculative step "
                    "takes ahead do not fit the KV pool."
                )
                return
            req.sampling_params.max_new_tokens = min(req.sampling_params.max_new_tokens, room)
        guest = guest_of(req)
        if guest is None:
            return
        longest = min(self.tp_worker.guest_context_len - 1, self.tp_worker.guest_kv.max_req_len(req) - ahead)
        room = longest - len(guest.prompt_ids) - 1
        if room < 1:
            req.set_finish_with_abort(
                f"{guest.model} context too long: {len(guest.prompt_ids)} tokens, but the {guest.model}'s context "
                f"length and KV pool allow {longest - 2}."
            )
            return
        params = req.sampling_params
        params.max_new_tokens = min(params.max_new_tokens, room)
        params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)

    def _add_request_to_queue(self, req: Req, *args, **kwargs) -> None:
        """SGLang's; a request that was refused goes on without its guest context."""
        # SGLang refuses a request by running it on one dummy token; it must not wait for room for its guest context.
        # One that was aborted by its client, and put back before that took effect, still samples a token, as it began.
        if guest_of(req) is not None and getattr(req.to_finish, "status_code", None) == HTTPStatus.BAD_REQUEST:
            req.mixing = None
        super()._add_request_to_queue(req, *args, **kwargs)

    def run_batch(self, batch: ScheduleBatch, *args, **kwargs):
        """SGLang's, after the guest's part of the batch has been planned."""
        if batch.forward_mode.is_extend() or batch.spec_algorithm.is_none():
            batch.guest_plan = self.guest_planner.plan(batch)
        # else the speculative worker makes the plan: under overlap the lengths are not known yet
        if self.mixing_metrics is not None:
            self.mixing_metrics.refresh()
        return super().run_batch(batch, *args, **kwargs)

    def on_idle(self) -> None:
        """SGLang's; metrics are published and the guest's slots counted."""
        super().on_idle()
        if self.mixing_metrics is not None:
            self.mixing_metrics.refresh()
        if self.is_fully_idle():
            self.invariant_checker.check_idle()

    @property
    def student_weight_version(self) -> str | None:
        """SGLang's version of the weights is the policy's."""
        policy = self.mixing_config.updated
        return self.weight_updater.student_version if policy == "teacher" else get_serving().weight_version

    def get_internal_state(self, recv_req):
        """SGLang's, with a section ``mixing``."""
        output = super().get_internal_state(recv_req)
        config, worker = self.mixing_config, self.tp_worker
        allocator, tree = self.token_to_kv_pool_allocator, self.tree_cache
        host_pool = {
            "size": allocator.size,
            "free": allocator.available_size(),
            "evictable": tree.evictable_size(),
            "protected": tree.protected_size(),
        }
        runners = {config.host: worker.model_runner, config.guest: worker.guest_runner}
        output.internal_state["mixing"] = {
            "teacher_model_path": runners["teacher"].model_config.model_path,
            "student_model_path": runners["student"].model_config.model_path,
            "student_revision": config.student_revision,
            "student_weight_version": self.student_weight_version,
            "policy": config.updated,
            "served_model": config.host,
            "alpha": config.alpha.model_dump(),
            f"{config.host}_pool": host_pool,
            "shared_weights": config.shared_weights,
            "plain_requests_of": config.plain_sides,
            "self_check": self.self_check_report,
            "equal_sides_tokens": worker.model_runner.sampling_observer.equal_sides.tokens,
            f"{config.guest}_pool": worker.guest_kv.stats(),
        }
        return output


def _check_decode_mem(original: Callable[..., bool], batch: ScheduleBatch, selected_indices=None) -> bool:
    """Decode only what fits both pools. SGLang's retraction loop converges on this same check."""
    if not original(batch, selected_indices):
        return False
    rows = range(len(batch.reqs)) if selected_indices is None else selected_indices
    mixed = [batch.reqs[i] for i in rows if guest_of(batch.reqs[i]) is not None]
    if not mixed:
        return True
    kv = batch.tree_cache.guest_kv
    guest = sum(map(kv.new_tokens_required, mixed, _growths(batch, mixed)))
    return kv.can_decode(guest, batch.new_tokens_required_next_decode(list(rows)))


def _growths(batch: ScheduleBatch, reqs: list[Req]) -> list[int]:
    """Tokens by which the host's row of each request grows in the next decode step, and the guest's with it."""
    if batch.spec_algorithm.is_none():
        return [1] * len(reqs)
    now, then, _ = page_aligned_decode_alloc_lens(
        reqs, reserve=get_alloc_reserve_per_decode(), page_size=batch.token_to_kv_pool_allocator.page_size
    )
    return [end - start for start, end in zip(now, then, strict=True)]


def _compute_max_prefix_len(original: Callable[[Req, int], int], req: Req, input_len: int) -> int:
    """The hidden states before a scored token are needed, which a cached prefix has not."""
    score = score_of(req)
    longest = original(req, input_len)
    return longest if score is None else min(longest, len(req.origin_input_ids) - 1 - score.length)


def _prepare_for_decode(original: Callable[[ScheduleBatch], None], batch: ScheduleBatch) -> None:
    """Where a step takes slots ahead, both sides do at once: a request may end before the step is run."""
    original(batch)
    if not batch.spec_algorithm.is_none():
        batch.tree_cache.guest_kv.reserve([req for req in batch.reqs if guest_of(req) is not None])


def configured_scheduler(config: MixingConfig) -> type[MixedScheduler]:
    """The class that SGLang makes its scheduler of, which it gives no arguments of ours."""

    class ConfiguredScheduler(MixedScheduler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, mixing_config=config, **kwargs)

    return ConfiguredScheduler


def _row_headroom(config: MixingConfig) -> Callable[[Callable[[], int]], int]:
    """Tokens that a row of KV slots must hold beyond the context length: what a speculative step takes ahead."""
    return lambda original: original() + 2 * (config.longest_draft + 1)


def run_mixed_scheduler_process(config: MixingConfig, *args, **kwargs) -> None:
    """Scheduler process with a guest; the arguments after ``config`` are SGLang's ``run_scheduler_process``'s."""
    from sglang.srt.managers import scheduler

    registry.register()  # again: SGLang logs what its plugins raise
    # SGLang applies these when the process loads its plugins, before it builds the scheduler.
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler", configured_scheduler(config), HookType.REPLACE)
    HookRegistry.register(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem", _check_decode_mem, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len", _compute_max_prefix_len, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode", _prepare_for_decode, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.mem_cache.kv_cache_configurator.get_req_to_token_extra_context_len",
        _row_headroom(config),
        HookType.AROUND,
    )
    scheduler.run_scheduler_process(*args, **kwargs)


def scheduler_process(config: MixingConfig) -> Callable[..., None]:
    """The picklable process function to hand to SGLang's Engine or launch_server."""
    return functools.partial(run_mixed_scheduler_process, config)
