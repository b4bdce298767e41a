"""What the runtime relies on in SGLang: names, signatures and call conventions.

An SGLang upgrade fails here first, and each failure names what is gone. No engine is started.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import inspect
import re
import textwrap
import tomllib
import types
from array import array
from pathlib import Path
from typing import Any

import intrusions
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

SRT = "sglang.srt."


def resolve(path: str) -> Any:
    """The object at a dotted path such as ``managers.scheduler.Scheduler.run_batch``, below ``sglang.srt`` unless the
    path begins with ``sglang.``."""
    parts = (path if path.startswith("sglang.") else SRT + path).split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not ".".join(parts[:cut]).startswith(error.name):
                raise
            continue
        for i, name in enumerate(parts[cut:], cut):
            # A dict keeps descriptors of structs and dataclasses as they are; getattr follows inheritance.
            assert hasattr(found, name), f"SGLang has no {'.'.join(parts[: i + 1])}"
            found = getattr(found, name)
        return found
    raise AssertionError(f"SGLang has no module of {'.'.join(parts)}")


@functools.cache
def members(cls: type) -> frozenset[str]:
    """Everything an instance has: class attributes, annotated fields, and ``self.name = …`` in any method."""
    names = set(dir(cls)) | set(getattr(cls, "__struct_fields__", ()))
    for base in cls.__mro__[:-1]:
        names |= set(getattr(base, "__annotations__", ()))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        for node in ast.walk(tree):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
    return frozenset(names)


def test_the_release_is_a_supported_one():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (sglang,) = [
        one for one in map(Requirement, tomllib.loads(text)["project"]["dependencies"]) if one.name == "sglang"
    ]
    assert sglang.specifier.contains(importlib.metadata.version("sglang"))


# What runtime/releases.py does without in an older release, and what an answer lacks there (docs/compatibility.md).
SINCE = {
    "sglang.srt.parser.python_chat_template.get_python_chat_template": "0.5.23",
    "parser.template_manager.TemplateManager.python_chat_template": "0.5.23",
    "managers.scheduler.Scheduler._create_generation_req": "0.5.23",
    'f"Grammar accept_token failed: ': "0.5.23",
}


def _skip_what_is_newer(what: str) -> None:
    since = SINCE.get(what)
    if since is not None and Version(importlib.metadata.version("sglang")) < Version(since):
        pytest.skip(f"SGLang has it since {since}")


# What only a device has, or only a running server; conventions below hold the first, `MEMBERS` the second.
ELSEWHERE = {
    "sglang.srt.layers.sampler.top_k_renorm_prob",
    "sglang.srt.layers.sampler.top_p_renorm_prob",
    "sglang.srt.entrypoints.http_server._global_state.tokenizer_manager",
}
# Used without an import of their own: through an instance or a name, or by tests.
ALSO = {
    "entrypoints.http_server.app.add_api_route",
    "entrypoints.http_server.app.user_middleware",
    "entrypoints.openai.serving_chat.OpenAIServingChat.__init__",
    "environ.envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get",
    "environ.envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
    "environ.envs.SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE.get",
    "environ.envs.SGLANG_RUST_SERVER.get",
    "lora.backend.torch_backend.TorchNativeLoRABackend",
    "managers.scheduler.Scheduler.flush_cache",
    "managers.scheduler.Scheduler.ingest_requests",
    "managers.scheduler.Scheduler.run_event_loop",
    "managers.scheduler_components.output_sender.SenderWrapper",
    "managers.tokenizer_manager._slice_streaming_output_meta_info",
    "model_executor.graph_shared_output.GraphSharedOutput._process_shared",
    "model_executor.input_buffers._forward_input_buffer_pool",
    "parser.template_manager.TemplateManager.chat_template_name",
    "parser.template_manager.TemplateManager.python_chat_template",
    "platforms.interface.SRTPlatform.get_default_attention_backend",
    "platforms.interface.SRTPlatform.init_backend",
    "server_args.ServerArgs.resolve_once",
    "sglang.lang.ir.SglSamplingParams.to_srt_kwargs",
    "sglang.utils.TypeBasedDispatcher.__iadd__",
}
IMPORTED = sorted((intrusions.imported() | intrusions.hooked()) - ELSEWHERE) + sorted(ALSO)


def test_the_walk_finds_imports():
    """In any place and any form; it must not be empty for a reason of its own."""
    found = intrusions.imported() | intrusions.hooked()
    assert found > ELSEWHERE
    assert {
        "sglang.srt.managers.scheduler.Scheduler",
        "sglang.srt.plugins.hook_registry.HookType.AROUND",
        "sglang.launch_server.run_server",
        "sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem",
    } < found


@pytest.mark.parametrize("path", IMPORTED)
def test_imported(path):
    _skip_what_is_newer(path)
    resolve(path)


# Callable: the parameters that we pass by name or override by position, in SGLang's order.
SIGNATURES = {
    "configs.model_config.ModelConfig.from_server_args": ("server_args", "model_path", "model_revision"),
    "entrypoints.engine.Engine.async_generate": ("sampling_params", "input_ids", "stream"),
    "entrypoints.engine.Engine.generate": ("sampling_params", "input_ids", "stream"),
    "entrypoints.engine.init_tokenizer_manager": ("server_args", "port_args", "TokenizerManagerClass"),
    "entrypoints.http_server.launch_server": (
        "server_args", "init_tokenizer_manager_func", "run_scheduler_process_func",
    ),
    "layers.sampler.Sampler.forward": ("self", "logits_output", "sampling_info"),
    "layers.sampler.register_sampler_backend": ("backend", "factory"),
    "lora.lora_manager.LoRAManager.prepare_lora_batch": ("self", "forward_batch"),
    "lora.lora_registry.LoRARef.deterministic_id": ("lora_name", "lora_path"),
    "managers.schedule_batch.Req.set_finish_with_abort": ("self", "error_msg"),
    "managers.schedule_batch.ScheduleBatch.check_decode_mem": ("self", "selected_indices"),
    "managers.schedule_policy.PrefillAdder.add_one_req": (
        "self", "req", "has_chunked_req", "truncation_align_size",
    ),
    "entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response": ("self", "request", "ret", "created"),
    "entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request": (
        "self", "request", "raw_request",
    ),
    "entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream": (
        "self", "adapted_request", "request", "raw_request",
    ),
    "entrypoints.openai.serving_completions.OpenAIServingCompletion._build_completion_response": (
        "self", "request", "ret", "created",
    ),
    "entrypoints.openai.serving_completions.OpenAIServingCompletion._generate_completion_stream": (
        "self", "adapted_request", "request", "raw_request",
    ),
    "managers.scheduler.Scheduler.init_metrics_reporter": ("self",),
    "managers.scheduler.Scheduler.init_request_dispatcher": ("self",),
    "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.update_weights_from_disk": (
        "self", "recv_req",
    ),
    "managers.tokenizer_manager.TokenizerManager._wait_for_model_update_from_disk": ("self", "obj"),
    "managers.tokenizer_manager.TokenizerManager.generate_request": ("self", "obj", "request"),
    "managers.tokenizer_manager.TokenizerManager.update_weights_from_disk": ("self", "obj", "request"),
    "model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk": (
        "self", "model_path", "load_format", "recapture_cuda_graph",
    ),
    "managers.scheduler.Scheduler._add_request_to_queue": ("self", "req", "is_retracted"),
    "managers.scheduler.Scheduler._create_generation_req": ("self", "recv_req"),
    "managers.scheduler.Scheduler.get_internal_state": ("self", "recv_req"),
    "managers.scheduler.Scheduler.get_prefill_adder_class": ("self",),
    "managers.scheduler.Scheduler.init_chunked_prefill": ("self",),
    "managers.scheduler.Scheduler.init_req_max_new_tokens": ("self", "req"),
    "managers.scheduler.Scheduler.init_tp_model_worker": ("self",),
    "managers.scheduler.Scheduler.is_fully_idle": ("self",),
    "managers.scheduler.Scheduler.on_idle": ("self",),
    "managers.scheduler.Scheduler.run_batch": ("self", "batch"),
    "managers.tokenizer_manager.TokenizerManager._create_tokenized_object": (
        "self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs",
    ),
    "managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason": ("self", "out", "state", "is_stream"),
    "managers.tokenizer_manager.TokenizerManager.release_memory_occupation": ("self", "obj", "request"),
    "managers.tokenizer_manager.TokenizerManager.resume_memory_occupation": ("self", "obj", "request"),
    "parser.template_manager.TemplateManager.load_chat_template": (
        "self", "tokenizer_manager", "chat_template_arg", "model_path",
    ),
    "managers.tokenizer_manager.TokenizerManager.init_tokenizer_and_processor": ("self",),
    "managers.tokenizer_manager.TokenizerManager.update_request_meta_info": (
        "self", "meta_info", "state", "customized_info", "index", "finish_reason",
    ),
    "managers.tp_worker.TpModelWorker.__init__": ("self", "server_args", "gpu_id", "nccl_port"),
    "managers.tp_worker.TpModelWorker._init_model_config": ("self",),
    "managers.tp_worker.TpModelWorker.alloc_memory_pool": ("self",),
    "managers.tp_worker.TpModelWorker.forward_batch_generation": ("self", "batch"),
    "managers.tp_worker.TpModelWorker.get_memory_pool": ("self",),
    "managers.tp_worker.TpModelWorker.init_attention_backends": ("self",),
    "managers.tp_worker.TpModelWorker.init_cuda_graphs": ("self", "capture_decode_cuda_graph"),
    "mem_cache.allocation.alloc_token_slots": ("tree_cache", "num_tokens"),
    "mem_cache.allocation.alloc_paged_token_slots_decode": ("tree_cache", "seq_lens", "seq_lens_cpu", "last_loc"),
    "mem_cache.allocation.alloc_paged_token_slots_extend": (
        "tree_cache", "prefix_lens", "prefix_lens_cpu", "seq_lens", "seq_lens_cpu", "last_loc", "extend_num_tokens",
    ),
    "mem_cache.allocation_sizing.page_aligned_decode_alloc_lens": ("reqs", "reserve", "page_size"),
    "mem_cache.kv_cache_configurator.KVCacheConfigurator.resolve_max_num_reqs": ("self", "token_capacity"),
    "mem_cache.base_prefix_cache.InsertParams": ("key", "value", "prev_prefix_len", "inserted_len", "priority"),
    "mem_cache.base_prefix_cache.MatchPrefixParams": ("key",),
    "mem_cache.cache_init_params.CacheInitParams": (
        "disable", "req_to_token_pool", "token_to_kv_pool_allocator", "page_size", "eviction_policy",
    ),
    "mem_cache.common.evict_from_tree_cache": ("tree_cache", "num_tokens"),
    "mem_cache.radix_cache.RadixCache.insert": ("self", "params"),
    "mem_cache.radix_cache.RadixCache.lock": ("self", "node"),
    "mem_cache.radix_cache.RadixCache.match_prefix": ("self", "params"),
    "mem_cache.radix_cache.RadixCache.path_device_indices": ("self", "node"),
    "mem_cache.radix_cache.RadixKey": ("token_ids", "extra_key", "cache_salt"),
    "mem_cache.registry.create_unified_radix_cache": ("ctx", "cache_class"),
    "mem_cache.registry.register_radix_cache_backend": ("name", "factory"),
    "mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint": ("self", "req", "up_to"),
    "mem_cache.unified_radix_cache.UnifiedRadixCache.on_release": ("self", "req", "checkpointed"),
    "mem_cache.unified_radix_cache.UnifiedRadixCache.reset": ("self",),
    "eplb.expert_location.set_global_expert_location_metadata": ("value", "allow_overwrite"),
    "managers.schedule_batch.FINISH_ABORT": ("message", "status_code", "err_type"),
    "managers.scheduler_components.invariant_checker.SchedulerInvariantChecker.self_check_during_busy": ("self",),
    "managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._get_total_uncached_sizes": ("self",),
    "model_executor.forward_batch_info.ForwardBatch.init_new": (
        "batch", "model_runner", "return_hidden_states_before_norm",
    ),
    "model_executor.model_runner.ModelRunner.forward": ("self", "forward_batch"),
    "plugins.hook_registry.HookRegistry.register": ("target", "hook", "hook_type"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint._generate_http_request": ("self", "s", "data"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.generate": ("self", "s", "sampling_params"),
    "sglang.lang.backend.runtime_endpoint.RuntimeEndpoint.generate_stream": ("self", "s", "sampling_params"),
    "sglang.lang.interpreter.StreamExecutor": (
        "backend", "arguments", "default_sampling_para", "chat_template", "stream", "use_thread",
    ),
    "sglang.lang.interpreter.StreamExecutor._execute_gen": ("self", "expr"),
    "sglang.lang.ir.SglGen": (
        "name", "max_new_tokens", "min_new_tokens", "n", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p",
        "top_k", "min_p", "frequency_penalty", "presence_penalty", "ignore_eos", "return_logprob", "logprob_start_len",
        "top_logprobs_num", "return_text_in_logprobs", "dtype", "regex", "json_schema",
    ),
    "sampling.sampling_batch_info.SamplingBatchInfo.apply_logits_bias": ("self", "logits"),
    "layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode": (
        "self", "query", "output", "k_cache", "v_cache", "enable_gqa", "is_cross_attn", "sliding_window_size",
    ),
    "layers.attention.torch_native_backend.TorchNativeAttnBackend.init_forward_metadata": ("self", "forward_batch"),
    "layers.logprob_processor.compute_spec_logprobs": ("batch", "logits_output", "predict", "chain_stride"),
    "managers.overlap_utils.FutureMap": (
        "device", "spec_algo", "req_to_token_pool", "needs_cpu_seq_lens", "needs_confidence_relay",
    ),
    "managers.schedule_batch.ScheduleBatch.new_tokens_required_next_decode": ("self", "selected_indices"),
    "managers.schedule_batch.ScheduleBatch.prepare_for_decode": ("self",),
    "mem_cache.allocation.assign_req_to_token_pool_func": (
        "req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size",
    ),
    "model_executor.model_runner.ModelRunner.sample": ("self", "logits_output", "forward_batch"),
    "speculative.base_spec_worker.BaseSpecWorker.on_verify_complete_cpu": (
        "self", "num_correct_drafts_per_req", "batch_size",
    ),
    "speculative.spec_info.SpeculativeAlgorithm.register": ("name", "supports_overlap", "spec_class"),
    "utils.hf_transformers_utils.get_tokenizer": (
        "tokenizer_name", "tokenizer_mode", "trust_remote_code", "revision", "tokenizer_backend",
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    _skip_what_is_newer(path)
    wanted = SIGNATURES[path]
    parameters = inspect.signature(resolve(path)).parameters
    missing = [p for p in wanted if p not in parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert not missing or (takes_any and path in FORWARDED), f"{path} has no {missing}; it takes {list(parameters)}"
    present = [p for p in parameters if p in wanted]
    assert present == [p for p in wanted if p in present], f"{path} takes them in another order: {present}"


FORWARDED = frozenset({"utils.hf_transformers_utils.get_tokenizer"})
"""Callables that pass **kwargs on."""


# Class: what is read or set on its instances.
MEMBERS = {
    "entrypoints.engine.Engine": (
        "generate", "async_generate", "shutdown", "tokenizer_manager", "flush_cache", "get_server_info", "loop",
        "init_tokenizer_manager_func", "run_scheduler_process_func", "_attached", "_scheduler_init_result",
        "_weight_cache_daemon_procs", "_terminate_weight_cache_daemons", "send_to_rpc",
    ),
    "entrypoints.engine.SchedulerInitResult": ("all_child_pids", "stop_grpc_server"),
    "managers.schedule_batch.Req": (
        "sampling_params", "output_ids", "origin_input_ids", "full_untruncated_fill_ids", "extend_end", "extra_key",
        "cache_salt", "kv", "to_finish", "finished", "customized_info", "owned_kv_len",
        "lora_id", "rid", "finished_reason", "finished_len", "skip_radix_cache_insert",
    ),
    "managers.io_struct.GenerateReqInput": (
        "rid", "sampling_params", "session_params", "session_id", "lora_path", "input_embeds", "image_data",
        "video_data", "audio_data", "positional_embed_overrides", "multi_item_delimiter_indices", "watermark",
    ),
    "sampling.sampling_params.SamplingParams": ("beam_width",),
    "managers.auxiliary_output.CommittedTokens": ("output_index", "token_ids"),
    "managers.utils.GenerationBatchResult": (
        "extra_keep_alive_refs",
        "logits_output", "next_token_ids", "accept_lens", "new_seq_lens", "next_draft_input",
        "speculative_num_draft_tokens", "can_run_cuda_graph",
    ),
    "layers.logits_processor.LogitsProcessorOutput": (
        "next_token_logits", "next_token_logprobs", "next_token_top_logprobs_val", "next_token_top_logprobs_idx",
        "next_token_token_ids_logprobs_val", "next_token_token_ids_logprobs_idx", "auxiliary_device_output",
    ),
    "speculative.base_spec_worker.BaseSpecWorker": ("target_worker", "draft_worker", "spec_v2_attn_backends"),
    "configs.model_config.ModelConfig": (
        "is_generation", "is_encoder_decoder", "is_multimodal", "is_hybrid_swa", "hf_config", "context_len",
    ),
    "managers.scheduler_components.invariant_checker.SchedulerInvariantChecker": ("get_last_batch", "_report_leak"),
    "managers.schedule_batch.ScheduleBatch": (
        "beam_tail", "input_embeds", "replace_embeds", "replace_positions",
        "reqs", "forward_mode", "device", "input_ids", "req_pool_indices", "req_pool_indices_cpu", "seq_lens",
        "seq_lens_cpu", "seq_lens_sum", "orig_seq_lens", "out_cache_loc", "prefix_lens", "extend_lens",
        "extend_num_tokens", "extend_logprob_start_lens", "sampling_info", "has_grammar", "return_logprob",
        "top_logprobs_nums", "token_ids_logprobs", "extend_input_logprob_token_ids", "return_hidden_states_mode",
        "decoding_reqs", "multimodal_inputs", "tree_cache", "spec_info", "spec_algorithm", "req_to_token_pool",
        "mamba_track_indices", "mamba_track_mask", "mamba_track_seqlens", "mamba_track_seqlens_cpu",
        "mamba_prefill_track_mask_cpu", "mamba_cow_src_indices", "mamba_cow_dst_indices", "mamba_clear_indices",
    ),
    "managers.schedule_policy.PrefillAdder": (
        "running_batch", "can_run_list", "rem_input_tokens", "_get_running_request_total_token_offset",
    ),
    "managers.scheduler.Scheduler": (
        "gracefully_exit", "ipc_channels", "draft_worker", "process_input_requests",
        "server_args", "nccl_port", "tp_worker", "tree_cache", "token_to_kv_pool_allocator", "chunked_prefill_size",
        "invariant_checker", "metrics_reporter", "weight_updater", "_request_dispatcher",
    ),
    "managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter": ("metrics_collector_context",),
    "managers.io_struct.UpdateWeightFromDiskReqInput": (
        "model_path", "load_format", "weight_version", "flush_cache", "recapture_cuda_graph", "manifest",
    ),
    "managers.io_struct.UpdateWeightFromDiskReqOutput": ("success", "message"),
    "observability.metrics_collector.SchedulerMetricsCollectorContext": (
        "current_scheduler_metrics_enabled", "collector",
    ),
    "observability.metrics_collector.SchedulerMetricsCollector": ("labels",),
    "managers.tokenizer_manager.TokenizerManager": (
        "server_args", "model_config", "tokenizer", "_create_tokenized_object", "abort_request",
        "model_path", "served_model_name", "serving_chat_class", "server_status",
    ),
    "managers.tp_worker.TpModelWorker": ("model_config", "model_runner", "random_seed", "enable_spec"),
    "mem_cache.radix_cache.RadixCache": (
        "disable", "insert", "match_prefix", "lock", "unlock", "reset", "evictable_size", "protected_size",
        "path_device_indices", "all_values_flatten",
    ),
    "mem_cache.registry.TreeCacheBuildContext": ("tp_worker",),
    "mem_cache.base_prefix_cache.MatchResult": ("last_device_node", "device_prefix_len"),
    "mem_cache.base_prefix_cache.InsertResult": ("prefix_len",),
    "mem_cache.allocator.TokenToKVPoolAllocator": (
        "size", "page_size", "available_size", "free_segment", "clear", "get_all_free_pages",
    ),
    "mem_cache.allocator.mamba.MambaSlotAllocator": ("alloc", "free", "clear", "available_size"),
    "mem_cache.memory_pool.HybridReqToTokenPool": (
        "mamba_pool", "mamba_allocator", "req_index_to_mamba_index_mapping",
    ),
    "mem_cache.memory_pool.ReqToTokenPool": ("size", "write", "req_to_token"),
    "model_executor.model_runner.ModelRunner": (
        "sampler", "sampling_observer", "req_to_token_pool", "max_running_requests", "max_total_num_tokens",
        "pre_model_load_memory", "init_kv_cache_configurator", "kv_cache_configurator", "forward", "lora_manager",
        "device", "_init_post_memory_pool_components", "init_decode_cuda_graph", "decode_cuda_graph_runner",
        "prefill_cuda_graph_runner", "eager_runner", "attn_backend", "kv_cache_dtype", "dtype",
        "prefill_attention_backend_str", "decode_attention_backend_str", "kv_index_translator",
    ),
    "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner": ("buffer_registry", "capture_bs"),

    "sampling.sampling_batch_info.SamplingBatchInfo": (
        "temperatures", "penalizer_orchestrator", "acc_additive_penalties", "acc_scaling_penalties", "grammar_mask",
        "logit_bias", "apply_logits_bias", "__len__", "grammars", "top_ks", "top_ps", "min_ps", "is_all_greedy",
        "need_top_k_sampling", "need_top_p_sampling", "need_min_p_sampling", "is_any_greedy", "max_top_k",
    ),
    "sglang.lang.interpreter.StreamExecutor": (
        "backend", "text_", "images_", "variables", "chat_template", "default_sampling_para", "num_api_spec_tokens",
    ),
    "server_args.ServerArgs": (
        "model_path", "tokenizer_path", "revision", "trust_remote_code", "sampling_backend", "radix_cache_backend",
        "pp_size", "page_size", "tokenizer_worker_num", "disaggregation_mode", "enable_mixed_chunk",
        "speculative_algorithm", "enable_dp_attention", "enable_lora", "lora_paths", "enable_hierarchical_cache",
        "enable_streaming_session", "enable_eplb", "ep_dispatch_algorithm", "expert_distribution_recorder_mode",
        "enable_pdmux", "dllm_algorithm", "enable_two_batch_overlap", "enable_lmcache",
        "enable_flexkv", "enable_unified_cache_external_linker", "encoder_only", "grpc_mode", "smg_grpc_mode",
        "use_ray", "attn_dp_size", "attn_cp_size", "dcp_size", "max_loras_per_batch", "lora_backend",
        "speculative_num_steps", "speculative_num_draft_tokens", "speculative_eagle_topk",
        "enable_deterministic_inference", "enable_return_hidden_states", "return_hidden_states_mode",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "path,name", [(path, name) for path, names in MEMBERS.items() for name in names], ids=lambda value: value
)
def test_member(path, name):
    assert name in members(resolve(path)), f"SGLang's {path} has no {name}"


# (callable, pattern in its source, what we rely on)
CONVENTIONS = (
    ("entrypoints.engine.Engine.shutdown",
     r"if self\._attached:[\s\S]*?return\n[\s\S]*kill_process_tree\(os\.getpid\(\)",
     "an engine whose processes are another's kills none; any other kills every child of the process"),
    ("entrypoints.engine.Engine._launch_subprocesses", r"_launch_scheduler_processes\([\s\S]*_launch_detokenizer_"
     r"subprocesses\([\s\S]*all_child_pids\.append\(p\.pid\)", "schedulers and detokenizers are all its processes"),
    ("managers.scheduler.Scheduler._handle_generate_request", r"init_req_max_new_tokens\(req\)",
     "the scheduler bounds every request's length before it queues it"),
    ("managers.scheduler.Scheduler._handle_generate_request", r"set_finish_with_abort\([\s\S]*?_add_request_to_queue\(",
     "a refused request is queued"),
    ("managers.schedule_batch.Req.set_finish_with_abort", r"self\.to_finish = FINISH_ABORT\(", "… and marked"),
    ("managers.schedule_batch.Req.set_finish_with_abort", r"status_code: int = HTTPStatus\.BAD_REQUEST",
     "… as a bad request, which no other end is"),
    ("managers.scheduler.Scheduler.event_loop_overlap", r"self_check_during_busy\(\)", "leaks are sought while busy"),
    ("managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._visible_output_len",
     r"req\.finished_len if req\.finished_len is not None", "finished_len says what of the output is visible"),
    ("managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason",
     r"raise fastapi\.HTTPException\(\s*status_code=status_code", "an abort with a status is an error of HTTP"),
    ("managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._apply_prefill_grammar",
     r'f"Grammar accept_token failed: ', "what SGLang says where a grammar goes on with no token"),
    ("managers.schedule_batch.ScheduleBatch.retract_decode", r"check_decode_mem\(",
     "retraction goes on until check_decode_mem is satisfied"),
    ("mem_cache.common.release_kv_cache", r"tree_cache\.on_release\(req, checkpointed=checkpoint\)",
     "the tree cache hears of every release"),
    ("mem_cache.common.release_kv_cache", r"tree_cache\.checkpoint\(req, up_to=[\s\S]*on_release\(",
     "a finished request is checkpointed before it is released"),
    ("sampling.sampling_batch_info.SamplingBatchInfo.apply_logits_bias_with_observer",
     r"observer\.before_grammar\(logits, self\)", "the observer comes before the grammar mask"),
    ("model_executor.model_runner.ModelRunner.sample",
     r"self\.sampler\(\s*logits_output,\s*forward_batch\.sampling_info,[\s\S]*observer\.after_sample\(\s*observer_state,"
     r"\s*next_token_ids", "the sampler runs between the observer's two calls"),
    ("managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor.consume_auxiliary_output",
     r"output\.consume\(batch, ", "extras are handed out with the committed tokens"),
    ("entrypoints.http_server.lifespan", r"tokenizer_manager\.serving_chat_class\(",
     "the tokenizer manager chooses the class of the chat route"),
    ("managers.scheduler.Scheduler.__init__", r"init_tp_model_worker|init_model_worker[\s\S]*init_metrics_reporter\(\)"
     r"[\s\S]*init_request_dispatcher\(\)", "metrics and dispatcher come after the workers"),
    ("entrypoints.http_server._setup_and_run_http_server", r"app_has_admin_force_endpoints|add_api_key_middleware",
     "api keys cover every route of the application"),
    ("sglang.lang.interpreter.StreamExecutor._execute_gen", r"self\.backend\.generate\(\s*self,\s*sampling_params=",
     "a gen asks the executor's backend, with the executor"),
    ("sglang.lang.interpreter.StreamExecutor._execute",
     r"isinstance\(other, SglGen\)[\s\S]*self\._execute_gen\(other\)", "kinds of SglGen are executed as one"),
    ("sglang.lang.interpreter.run_program", r'hasattr\(backend, "endpoint"\)', "a backend may name its endpoint"),
    ("arg_groups.lora_hook.check_lora_server_args", r"lora_id=LoRARef\.deterministic_id\(\s*lora_path\[\"lora_name\"\]",
     "an adapter's id follows from its name and path"),
    ("managers.schedule_batch.Req.__init__", r"lora_id is not None:[\s\S]*\+ lora_id",
     "the radix cache keeps an adapter's KV apart by the extra key"),
    ("model_executor.forward_batch_info.ForwardBatch.init_new", r"lora_ids=\[req\.lora_id for req in batch\.reqs\]",
     "a forward asks each request for its adapter"),
    ("model_executor.runner.eager_runner.EagerRunner.__init__", r"max_bs = mr\.max_running_requests",
     "eager buffers have a row for each running request"),
    ("model_executor.runner.base_cuda_graph_runner.get_batch_sizes_to_capture",
     r"num_max_requests = model_runner\.req_to_token_pool\.size", "graphs are captured up to the number of rows"),
    ("layers.attention.attention_registry.register_attention_backend", r"ATTENTION_BACKENDS\[name\] = fn",
     "an attention backend that is registered again is another one"),
    ("managers.overlap_utils.FutureMap._resolve_spec_extras",
     r"draft_input\.bonus_tokens = self\.output_tokens_buf\[indices\]", "under overlap the last tokens come back"),
    ("managers.overlap_utils.RelayPayload.from_draft_input", r"bonus_tokens=draft_input\.bonus_tokens",
     "… from what the step before left"),
    ("managers.scheduler.Scheduler.maybe_init_draft_worker", r"spec_algorithm\.create_worker\(self\.server_args\)"
     r"[\s\S]*DraftWorkerClass\(\*\*draft_worker_kwargs\)", "a registered algorithm makes the worker"),
    ("managers.scheduler.Scheduler.run_batch", r'fwd_kwargs\["on_publish"\]',
     "a speculative worker publishes the new lengths"),
    ("managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._resolve_spec_v2_tokens",
     r"on_verify_complete_cpu\([\s\S]*kv_committed_len \+= num_accept_tokens", "several tokens a step are committed"),
    ("mem_cache.allocation_sizing.get_alloc_reserve_per_decode", r"2 \* get_alloc_len_per_decode\(\)",
     "a step takes twice its tokens ahead"),
    ("speculative.eagle_utils.eagle_prepare_for_decode", r"alloc_for_spec_decode\(", "… before it is run"),
    # Two models in one process on a GPU; docs/architecture.md says why each of these is safe.
    ("model_executor.graph_shared_output.GraphSharedOutput.create_for_model_runner", r"cls\._process_shared = cls\(",
     "all models of a process with one vocabulary size have one buffer of logits"),
    ("model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute",
     r"output\.next_token_logits\[: self\.raw_num_token\]", "… of which a graph's output is a view"),
    ("model_executor.model_runner.ModelRunner._forward_raw",
     r"ModelRunnerOutput\(logits_output=ret, can_run_graph=can_run_graph\)", "… as the output says"),
    ("model_executor.model_runner.ModelRunner.alloc_memory_pool",
     r"token_to_kv_pool_allocator = result\.[\s\S]*self\._init_post_memory_pool_components\(\)",
     "the table of rows can be replaced before its readers are made"),
    ("model_executor.model_runner.ModelRunner._init_post_memory_pool_components",
     r"init_kv_index_translator\(\)[\s\S]*install_canary\([\s\S]*init_ngram_embedding_manager\(\)",
     "… which are these"),
    ("model_executor.model_runner.ModelRunner.init_kv_index_translator",
     r"req_to_token=self\.req_to_token_pool\.req_to_token", "… and the translator keeps the tensor"),
    ("model_executor.model_runner.ModelRunner.recapture_decode_cuda_graph", r"self\.init_decode_cuda_graph\(\)",
     "graphs are captured anew by one method"),
    ("model_executor.input_buffers.share_input_buffer", r"_forward_input_buffer_pool\.get\(key",
     "static inputs are shared by all runners of a process"),
    ("model_executor.cuda_graph_buffer_registry.build_decode_registry",
     r'GraphSlot\("input_ids", _tokens, torch\.int64, axis="tokens"\)', "padded rows keep old ids"),
    ("layers.attention.flashinfer_backend.FlashInferAttnBackend.init_forward_metadata_out_graph",
     r"for w in self\.decode_cuda_graph_metadata\[bs\]:\s*w\.begin_forward = partial\(fast_decode_plan, w\)",
     "flashinfer has one plan for each batch size"),
    ("layers.flashinfer_comm_fusion.FlashInferWorkspaceManager.initialize",
     r"self\.world_size == world_size:\s*self\.cleanup\(\)", "a workspace that is too small is made anew"),
    ("model_executor.runner.base_runner.BaseRunner._pre_initialize_flashinfer_allreduce_workspace",
     r"hidden_dim=mr\.model_config\.hidden_size", "… by each runner for its own model"),
    ("configs.model_config.ModelConfig.from_server_args", r"resolving_view\(server_args\)[\s\S]*else cfg\.quantization",
     "both models are loaded with one quantization"),
    ("model_executor.model_runner_components.misc_utils.maybe_disable_chunked_prefix_cache",
     r"disable_chunked_prefix_cache=True", "a model may turn prefix chunks off for the process"),
    ("managers.scheduler.Scheduler._apply_war_barrier",
     r"last_shared_read_runner\s*ev = runner\.shared_read_done_event\s*runner\.shared_read_done_event = None[\s\S]*"
     r"wait_event\(ev\)[\s\S]*wait_stream\(self\.forward_stream\)",
     "the barrier follows the teacher's last read, or the whole stream"),
    ("managers.scheduler.Scheduler.event_loop_overlap",
     r"self\.run_batch\(batch\)\s*#[^\n]*\s*self\._apply_war_barrier\(\)", "… right after each launch"),
    ("speculative.base_spec_worker.BaseSpecWorker",
     r"def last_shared_read_runner[\s\S]*return self\.target_worker\.model_runner", "… also where the student drafts"),
    ("layers.attention.base_attn_backend.AttentionBackend.shared_read_ends",
     r"is_target_verify\(\):\s*return SharedReadEnds\.IN_REPLAY\s*return SharedReadEnds\.UNKNOWN",
     "no prefill ends its reads early"),
    ("managers.overlap_utils.FutureMap.resolve_seq_lens_cpu", r"fwd_prepare_d2h_stream\.synchronize\(\)",
     "a speculative step is planned after the one before has published"),
    ("beam_search.batch_tail.append_beam_tail", r"batch\.seq_lens = torch\.cat\(",
     "beam search adds rows that are no requests"),
    ("managers.scheduler.Scheduler.ingest_requests", r"self\.process_input_requests\(recv_reqs\)",
     "the self-check's requests come in where all do"),
    ("managers.scheduler_components.output_sender.SenderWrapper.send_output",
     r"if self\.socket is None:\s*return", "… and its answers go nowhere"),
    ("entrypoints.engine._set_envs_and_config", r'mp\.set_start_method\("spawn", force=True\)', "processes start anew"),
    ("managers.scheduler.run_scheduler_process", r"parent_process = psutil\.Process\(\)\.parent\(\)",
     "a scheduler tells its parent that it failed, which may be a fork server"),
    ("managers.scheduler.run_scheduler_process", r"except Exception:[\s\S]*send_signal\(signal\.SIGQUIT\)",
     "a scheduler that leaves by SystemExit is not an exception"),
    ("entrypoints.engine._scheduler_died_error", r"\(exit code: \{proc\.exitcode\}\)", "… whose status is told"),
    # What a sampler of SGLang's leaves of a distribution, which drafts follow.
    ("layers.sampler", r"if is_cuda\(\):[\s\S]*?from sgl_kernel import \(\s*top_k_renorm_prob,\s*top_p_renorm_prob,",
     "on CUDA the sampler's module has its kernels under these names"),
    ("layers.sampler.Sampler._sample_from_probs", r"backend = get_exec\(\)\.kernel\.sampling_backend\s*"
     r'if backend in \("flashinfer", "intel_xpu"\):[\s\S]*elif backend == "pytorch":\s*[\s\S]*'
     r"= top_k_top_p_min_p_sampling_from_probs_torch\(", "the backend's name picks kernels or PyTorch"),
    ("layers.sampler.Sampler._sample_from_probs", r"if sampling_info\.need_min_p_sampling:\s*"
     r"probs = top_k_renorm_prob\(probs, sampling_info\.top_ks\)\s*"
     r"probs = top_p_renorm_prob\(probs, sampling_info\.top_ps\)\s*"
     r"batch_next_token_ids = min_p_sampling_from_probs\(\s*probs, sampling_info\.min_ps\s*\)",
     "where a row of the batch has a min-p, flashinfer's limits come in turn for all rows"),
    ("layers.sampler.Sampler._sample_from_probs", r"else:\s*batch_next_token_ids = top_k_top_p_sampling_from_probs\(\s*"
     r"probs\.contiguous\(\),\s*sampling_info\.top_ks,\s*sampling_info\.top_ps,\s*filter_apply_order=\"joint\"",
     "… else top-k and top-p both look at the whole row"),
    ("layers.sampler.Sampler._sample_from_probs", r"filtered_probs\.masked_fill_\(top_p_probs <= 0, 0\)",
     "… and the two renormalisations together leave what that sampler draws from"),
    ("layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch", r"probs_sum = torch\.cumsum\(probs_sort, dim=-1\)\s*"
     r"probs_sort\[[\s\S]*?>= top_ks\.view\(-1, 1\)\s*\] = 0\.0\s*"
     r"probs_sort\[\(probs_sum - probs_sort\) > top_ps\.view\(-1, 1\)\] = 0\.0[\s\S]*"
     r"min_p_thresholds = probs_sort\[:, 0\] \* min_ps\s*"
     r"probs_sort\[probs_sort < min_p_thresholds\.view\(-1, 1\)\] = 0\.0",
     "PyTorch's sampler applies all limits to one sorted distribution"),
    ("layers.sampler.Sampler.forward", r"if sampling_info\.is_all_greedy:[\s\S]*?= torch\.argmax\(logits, -1\)",
     "a batch of greedy rows takes the first of the most likely tokens"),
    ("sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch",
     r"is_any_greedy=any\(r\.sampling_params\.top_k <= 1[\s\S]*need_min_p_sampling=any\(r\.sampling_params\.min_p > 0",
     "flags of a batch are about any of its rows"),
    ("sampling.sampling_batch_info.SamplingBatchInfo.merge_batch",
     r"self\.need_min_p_sampling \|= other\.need_min_p_sampling[\s\S]*self\.max_top_k = \(\s*None\s*"
     r"if self\.max_top_k is None or other\.max_top_k is None\s*else max\(",
     "… also of a merged one, and max_top_k bounds every row's"),
    ("layers.sampler.create_sampler", r"get_exec\(\)\.kernel\.sampling_backend", "the factory is found by name"),
)  # fmt: skip


@pytest.mark.parametrize("path,pattern,meaning", CONVENTIONS, ids=[c[2] for c in CONVENTIONS])
def test_convention(path, pattern, meaning):
    _skip_what_is_newer(pattern)
    source = inspect.getsource(resolve(path))
    assert re.search(pattern, source), f"{path}: not seen any more: {meaning}"


def test_a_request_that_is_put_back_stays_mixed(monkeypatch):
    """Unless SGLang has refused it, and runs it on a dummy token to its end."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    from sglang_optimal.config import AlphaSettings
    from sglang_optimal.runtime.core import MixedRequest, Side
    from sglang_optimal.runtime.managers.scheduler import MixedScheduler, Scheduler

    monkeypatch.setattr(Scheduler, "_add_request_to_queue", lambda self, req: None)
    sides = [Side(model, array("q", [1])) for model in ("teacher", "student")]
    scheduler = object.__new__(MixedScheduler)
    for end, mixed in (
        (None, True),
        (FINISH_ABORT(), True),
        (FINISH_ABORT("no", 500), True),
        (FINISH_ABORT("no", 400), False),
    ):
        req = types.SimpleNamespace(mixing=MixedRequest(sides, AlphaSettings()), to_finish=end)
        scheduler._add_request_to_queue(req)
        assert (req.mixing is not None) is mixed, end


def test_entry_point_groups():
    from sglang.srt import plugins

    wanted = {"GENERAL_PLUGINS_GROUP": "sglang.srt.plugins", "PLATFORM_PLUGINS_GROUP": "sglang.srt.platforms"}
    for constant, group in wanted.items():
        assert getattr(plugins, constant, None) == group, f"SGLang's {constant} is not {group}"
        ours = importlib.metadata.entry_points(group=group)
        assert any(point.value.startswith("sglang_optimal.") for point in ours), f"{group}: not installed"
