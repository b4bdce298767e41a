"""The scheduler's model worker: the host, with the guest beside it."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import (
    get_context,
    get_exec,
    get_flags,
    get_memory,
    get_model,
    get_parallel,
    get_schedule,
    get_spec,
)

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.configs.model_config import is_recurrent
from sglang_optimal.runtime.core import PrefillPlan
from sglang_optimal.runtime.managers.guest_tp_worker import GuestTpModelWorker
from sglang_optimal.runtime.mem_cache.guest_kv import GuestKV, SeparateGuestKV
from sglang_optimal.runtime.model_executor.graph_runners import fence_plans, prepare_graphs, resized_buffers
from sglang_optimal.runtime.model_executor.guest_failure import guest_failure, no_logits
from sglang_optimal.runtime.model_executor.weight_updater import UpdatedModel
from sglang_optimal.runtime.sampling import sampler
from sglang_optimal.runtime.sampling.sampler import MixingStep
from sglang_optimal.runtime.sampling.sampling_observer import MixingObserver
from sglang_optimal.runtime.sampling.scoring import score, score_of, take_host_states, want_hidden_states
from sglang_optimal.runtime.sampling.support import Support

logger = logging.getLogger(__name__)

_OURS = "sglang_optimal.ordinary_decoding"


class MixedTpModelWorker(TpModelWorker):
    """SGLang's model worker, which has the host, with a guest.

    Args:
        config: the student and the defaults.
        **worker_kwargs: of SGLang's worker.

    Attributes:
        support: the ids that a mixture lives on.
    """

    support: Support
    rows_per_request: int
    """Rows of a request in the decode batches of the host's runner, at most."""

    def __init__(self, config: MixingConfig, **worker_kwargs):
        self.mixing_config = config
        self._guest_kv: GuestKV | None = None
        with sampler.beside_a_guest():
            with _kept_asleep(not config.is_updated(config.host)):
                super().__init__(**worker_kwargs)
            sampler.install(self.model_runner)
            self.init_guest(**worker_kwargs)

    def init_guest(self, **worker_kwargs) -> None:
        """Set ``guest``, ``support`` and ``rows_per_request``."""
        raise NotImplementedError

    @property
    def guest_runner(self) -> ModelRunner:
        """The model runner of the guest's forwards."""
        raise NotImplementedError

    @property
    def guest_context_len(self) -> int:
        """The guest's context length, in tokens."""
        return self.guest_runner.model_config.context_len

    @functools.cached_property
    def eos_token_ids(self) -> set[int]:
        """What ends a text of either model."""
        configs = (self.model_config, self.guest_runner.model_config)
        return {index for config in configs for index in config.hf_eos_token_id or ()}

    @property
    def guest_kv(self) -> GuestKV:
        """The guest's KV.

        Raises:
            RuntimeError: the memory pools do not exist yet.
        """
        if self._guest_kv is None:
            raise RuntimeError("the guest's KV is used before the memory pools are allocated")
        return self._guest_kv

    def runners_by_side(self) -> list[tuple[str, ModelRunner]]:
        """(role, runner) of all models as SGLang's tools for weights name them: the policy is the target."""
        return self.weight_update_runners()

    @property
    def student_model(self) -> UpdatedModel | None:
        """The student, where its weights can be updated alone."""
        return None

    @property
    def updated_models(self) -> list[UpdatedModel]:
        """The policy; empty where it is an adapter."""
        raise NotImplementedError

    def _updated(self, side: str, runner: ModelRunner, path: str, revision: str | None) -> UpdatedModel:
        return UpdatedModel(side, runner, path, revision, keeps=self.mixing_config.weight_rollback == "on")

    def _pools_are_there(self, guest_kv: GuestKV) -> None:
        self._guest_kv = guest_kv
        self.model_runner.sampling_observer = MixingObserver()

    def init_attention_backends(self) -> None:
        """SGLang's, with room for all rows of a request."""
        with resized_buffers(self.model_runner, self.rows_per_request):
            super().init_attention_backends()

    def init_cuda_graphs(self, capture_decode_cuda_graph: bool = True) -> None:
        """SGLang's, with room for all rows of a request."""
        with resized_buffers(self.model_runner, self.rows_per_request):
            super().init_cuda_graphs(capture_decode_cuda_graph)
        prepare_graphs(self.model_runner, self.rows_per_request)

    def _scored(
        self, batch: ScheduleBatch, step: MixingStep | None, forward: Callable, *args, **kwargs
    ) -> GenerationBatchResult:
        """What ``forward`` gives of the batch; completions whose prompts are complete with it are scored."""
        if not batch.forward_mode.is_extend() or all(score_of(req) is None for req in batch.reqs):
            return forward(batch, *args, **kwargs)
        mode = batch.return_hidden_states_mode
        want_hidden_states(batch, batch.reqs)
        try:
            result = forward(batch, *args, **kwargs)
        finally:  # the batch goes on to decode
            batch.return_hidden_states_mode = mode
        output = result.logits_output
        take_host_states(batch, output.hidden_states)
        output.hidden_states = None  # which no request asked for
        if step is not None and step.failure is None:
            step.scoring = score(step.rows, self.model_runner, self.guest_runner, self.support)
        return result

    def _failed(self, step: MixingStep, error: Exception, device: torch.device | str) -> None:
        """Let the step's requests end: the guest's forward raised ``error``."""
        step.failure = guest_failure(error, step.rows)
        step.guest_logits = no_logits(step.rows, self.support.size, device)


class _Share(NamedTuple):
    """Bytes for KV and states together, those of the states, and the tokens of KV that the rest holds."""

    budget: int
    states: int
    tokens: int


class SeparateTpModelWorker(MixedTpModelWorker):
    """Runs the forward of a guest with weights of its own, then SGLang's own host forward and sampling.

    The guest goes first so that SGLang's write-after-read barrier, which follows the host's forward on the same
    stream, covers both.
    """

    guest: GuestTpModelWorker

    def __init__(self, config: MixingConfig, **worker_kwargs):
        with _ordinary_decoding():
            super().__init__(config, **worker_kwargs)
        # Which lets SGLang put off the sampling of a prefill, but not where a speculative worker waits for it.
        self.enable_spec = config.longest_draft > 0

    def init_guest(self, **worker_kwargs) -> None:
        config = self.mixing_config
        with _settings_of_the_host(), _kept_asleep(not config.is_updated(config.guest)):
            self.guest = GuestTpModelWorker(config, random_seed=self.random_seed, **worker_kwargs)
        size = min(self.model_config.vocab_size, self.guest.model_config.vocab_size)
        self.support = Support.of_ids(size, list(config.tokens_of_one), self.model_runner.device)
        self.rows_per_request = 1 + config.longest_draft

    @property
    def guest_runner(self) -> ModelRunner:
        return self.guest.model_runner

    # -- weights ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def models(self) -> dict[str, UpdatedModel]:
        """{side: its model}."""
        config = self.mixing_config
        host = self._updated(config.host, self.model_runner, get_model().model_path, get_model().revision)
        guest = self._updated(config.guest, self.guest_runner, config.guest_path, config.guest_revision)
        return {config.host: host, config.guest: guest}

    @property
    def student_model(self) -> UpdatedModel:
        """The student's weights, which are its own."""
        return self.models["student"]

    @property
    def updated_models(self) -> list[UpdatedModel]:
        """The policy."""
        updated = self.mixing_config.updated
        return [self.models[side] for side in (("teacher", "student") if updated == "both" else (updated,))]

    def weight_update_runners(self) -> list[tuple[str, ModelRunner]]:
        """The policy's."""
        first, *rest = self.updated_models
        return [("target", first.runner), *((model.side, model.runner) for model in rest)]

    def runners_by_side(self) -> list[tuple[str, ModelRunner]]:
        """The policy's, and the other model's under its name."""
        policy = self.updated_models[0]
        others = [model for model in self.models.values() if model is not policy]
        return [("target", policy.runner), *((model.side, model.runner) for model in others)]

    # -- memory ----------------------------------------------------------------------------------------------------

    def alloc_memory_pool(self, *args, **kwargs) -> None:
        """Split one memory budget so that both pools hold the same number of tokens."""
        with _ordinary_decoding():
            self._alloc_both_pools(*args, **kwargs)

    def _alloc_both_pools(self, *args, **kwargs) -> None:
        user_limit = get_schedule().max_total_tokens
        get_context().override("sglang_optimal.kv_split", max_total_tokens=None)
        tokens = self._tokens_in_budget()
        tokens = tokens if user_limit is None else min(tokens, user_limit)
        get_context().override("sglang_optimal.kv_split", max_total_tokens=tokens)
        super().alloc_memory_pool(*args, **kwargs)
        runner = self.model_runner
        # The guest shares the scheduler's rows, so its row table must have the host's size.
        get_context().override("sglang_optimal.kv_split", max_running_requests=runner.max_running_requests)
        guest_limit = self.mixing_config.guest_max_total_tokens
        if guest_limit is not None:
            get_context().override("sglang_optimal.kv_split", max_total_tokens=min(tokens, guest_limit))
        with self._one_state_a_request(runner.max_running_requests):
            self.guest.alloc_memory_pool()
        get_context().override("sglang_optimal.kv_split", max_total_tokens=tokens)
        pool, allocator = self.guest.get_memory_pool()
        if pool.size < runner.req_to_token_pool.size:
            raise RuntimeError(
                f"the {self.mixing_config.guest}'s KV pool of {allocator.size} tokens serves {pool.size} requests, the "
                f"other's {runner.req_to_token_pool.size}; raise --mem-fraction-static or lower --max-running-requests."
            )
        kv = SeparateGuestKV(
            pool,
            allocator,
            disable_radix_cache=get_memory().disable_radix_cache,
            eviction_policy=get_memory().radix_eviction_policy,
        )
        self._pools_are_there(kv)
        if get_parallel().tp_rank == 0:
            logger.info(
                "KV pools: %s %d tokens, %s %d tokens (one budget, split for equal tokens)",
                self.mixing_config.host,
                runner.max_total_num_tokens,
                self.mixing_config.guest,
                allocator.size,
            )

    def _tokens_in_budget(self) -> int:
        """N such that N host tokens and N guest tokens fill the budget that the host alone would get, beside the states
        of recurrent layers, whose number does not depend on N.

        Raises:
            RuntimeError: the states leave nothing.
        """
        host = self._share_of_budget(self)
        most_requests = self.model_runner.kv_cache_configurator.resolve_max_num_reqs(host.tokens)
        with self._one_state_a_request(most_requests):
            guest = self._share_of_budget(self.guest)
        budget = min(host.budget, guest.budget)
        per_token = (host.budget - host.states) / host.tokens + (guest.budget - guest.states) / guest.tokens
        page = get_schedule().page_size
        tokens = int((budget - host.states - guest.states) / per_token) // page * page
        if tokens < page and host.states + guest.states:
            raise RuntimeError(
                "the states of both models' recurrent layers leave no memory for KV; lower --max-running-requests, "
                "--max-mamba-cache-size or --mamba-full-memory-ratio, or raise --mem-fraction-static."
            )
        return max(tokens, page)

    def _share_of_budget(self, worker: TpModelWorker) -> _Share:
        """What one model alone would make of all memory there is."""
        runner = worker.model_runner
        runner.init_kv_cache_configurator()
        configurator = runner.kv_cache_configurator
        left = configurator._profile_available_bytes(self.model_runner.pre_model_load_memory)
        states = 0
        if configurator.mambaish_config is not None:
            per_request = configurator.mambaish_config.mamba2_cache_params.mamba_cache_per_req
            states = (get_schedule().max_mamba_cache_size + 1) * per_request
        return _Share(left + states, states, configurator.config_from_budget(left).max_total_num_tokens)

    @contextlib.contextmanager
    def _one_state_a_request(self, requests: int) -> Iterator[None]:
        """Size the guest's states within: as many as requests run, since no radix cache keeps any."""
        if not is_recurrent(self.guest.model_config):
            yield
            return
        states, disabled = get_schedule().max_mamba_cache_size, get_memory().disable_radix_cache
        get_context().override(_OURS, max_mamba_cache_size=requests, disable_radix_cache=True)
        try:
            yield
        finally:
            get_context().override(_OURS, max_mamba_cache_size=states, disable_radix_cache=disabled)

    def init_attention_backends(self) -> None:
        """Of both models."""
        with self._ordinary_steps():
            super().init_attention_backends()
            self.guest.init_attention_backends()
        for worker in (self, self.guest):
            fence_plans(worker.model_runner.attn_backend)

    def init_cuda_graphs(self, capture_decode_cuda_graph: bool = True) -> None:
        """Of both models."""
        self._share_fusion_workspace()
        with self._ordinary_steps():
            super().init_cuda_graphs(capture_decode_cuda_graph)
            self.guest.init_cuda_graphs(capture_decode_cuda_graph)
        prepare_graphs(self.guest.model_runner, 1)

    @contextlib.contextmanager
    def _ordinary_steps(self) -> Iterator[None]:
        """Attention and graphs as without speculation, with page tables for what a step takes ahead of the context."""
        drafts = self.mixing_config.longest_draft
        if not drafts:
            yield
            return
        spec, ahead = get_spec(), 2 * (drafts + 1)
        steps, tokens = spec.speculative_num_steps, spec.speculative_num_draft_tokens
        configs = (self.model_config, self.guest.model_config)
        with _ordinary_decoding():
            get_context().override(_OURS, speculative_num_steps=None, speculative_num_draft_tokens=None)
            for config in configs:
                config.context_len += ahead
            try:
                yield
            finally:
                for config in configs:
                    config.context_len -= ahead
                get_context().override(_OURS, speculative_num_steps=steps, speculative_num_draft_tokens=tokens)

    def _share_fusion_workspace(self) -> None:
        """One workspace of fused all-reduces, large enough for both models before any graph remembers where it is.

        SGLang has one a process; the larger model's warm-up would free the one in the other's graphs.
        """
        backend = get_exec().comm.flashinfer_allreduce_fusion_backend
        if backend is None or get_parallel().tp_size == 1:
            return
        runners = (self.model_runner, self.guest.model_runner)
        if backend == "cutedsl" or len({runner.dtype == torch.float32 for runner in runners}) > 1:
            raise RuntimeError(
                f"--flashinfer-allreduce-fusion-backend {backend}: two models cannot share its workspace where it is "
                "'cutedsl', or where one model alone is float32; choose another, or give both models one --dtype."
            )
        from sglang.srt.layers.flashinfer_comm_fusion import pre_initialize_workspaces
        from sglang.srt.layers.layer_boundary import FUSE_ALLREDUCE_MAX_BATCH_SIZE

        pre_initialize_workspaces(
            max_token_num=FUSE_ALLREDUCE_MAX_BATCH_SIZE,
            hidden_dim=max(runner.model_config.hidden_size for runner in runners),
            dtype=self.model_runner.dtype,
        )

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward_batch_generation(self, batch: ScheduleBatch | None, *args, **kwargs):
        """SGLang's, after the guest's forward."""
        if batch is None or batch.sampling_info is None:
            return super().forward_batch_generation(batch, *args, **kwargs)
        step = batch.sampling_info.mixing = self._guest_step(batch)
        result = self._scored(batch, step, super().forward_batch_generation, *args, **kwargs)
        if step is not None:  # its tensors are the scheduler's to drop, but the forward's to read
            result.extra_keep_alive_refs = [*(result.extra_keep_alive_refs or ()), batch.guest_plan]
        return result

    def _guest_step(self, batch: ScheduleBatch) -> MixingStep | None:
        plan = getattr(batch, "guest_plan", None)
        if plan is None:
            return None
        step = MixingStep(rows=plan.rows, guest_logits=None, support=self.support)
        forward = self.guest.forward_prefill if isinstance(plan, PrefillPlan) else self.guest.forward_decode
        try:
            step.guest_logits = forward(batch, plan)
        except Exception as error:
            self._failed(step, error, batch.device)
        return step


@contextlib.contextmanager
def _settings_of_the_host() -> Iterator[None]:
    """Load the guest within: settings of the process that SGLang derives from a model stay the host's."""
    if get_flags().moe.runner_backend is None:  # the host has no experts, but the guest may
        initialize_moe_config()
    without_prefix_chunks = get_schedule().disable_chunked_prefix_cache
    yield
    get_context().override(_OURS, disable_chunked_prefix_cache=without_prefix_chunks)


@contextlib.contextmanager
def _kept_asleep(needed: bool) -> Iterator[None]:
    """Load a model within; ``needed``: its weights are kept while they are released, because no trainer sends them."""
    asked = get_exec().features.enable_weights_cpu_backup
    get_context().override(_OURS, enable_weights_cpu_backup=asked or needed)
    try:
        yield
    finally:
        get_context().override(_OURS, enable_weights_cpu_backup=asked)


@contextlib.contextmanager
def _ordinary_decoding() -> Iterator[None]:
    """Models, pools and graphs as without speculation: a speculative step is made of ordinary decode batches."""
    algorithm = get_spec().speculative_algorithm
    get_context().override(_OURS, speculative_algorithm=None)
    try:
        yield
    finally:
        get_context().override(_OURS, speculative_algorithm=algorithm)
