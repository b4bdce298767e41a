"""Start-up: what SGLang's Engine and HTTP server need to become ours, and the checks that come before any GPU work."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sglang_optimal.config import OWN_TEMPLATE, MixingConfig, check_known
from sglang_optimal.names import ALGORITHM, SETTLED, STUDENT_ADAPTER
from sglang_optimal.platforms import cpu_ranks
from sglang_optimal.runtime.configs.vocabularies import Vocabularies

logger = logging.getLogger(__name__)

OTHER_FRONT_ENDS = ("encoder_only", "grpc_mode", "smg_grpc_mode", "use_ray")
"""ServerArgs fields that start something else than SGLang's HTTP server."""

_PLAIN = "give --student-weights none for a server that does not mix"


@dataclasses.dataclass(frozen=True)
class _Beside:
    """Beside which students something is refused.

    Attributes:
        applies: whether the settled configuration has such a student.
        words: how the message says it.
        instead: what the message says can be done.
    """

    applies: Callable[[MixingConfig], bool]
    words: str = "beside a student"
    instead: str = f"remove the flag, or {_PLAIN}"


_ANY = _Beside(lambda config: True)
# A second model runner, of which SGLang knows nothing.
_OWN_WEIGHTS = _Beside(lambda config: not config.shared_weights, "beside a student with weights of its own")
_DRAFTING = _Beside(lambda config: config.longest_draft > 0, "where the student drafts", "use lockstep mixing")
_LOCKSTEP = _Beside(lambda config: config.longest_draft == 0)
_ADAPTER = _Beside(lambda config: config.student_lora_path is not None, "beside --student-lora-path", "remove the flag")
_NO_ADAPTER = _Beside(lambda config: config.student_lora_path is None)


def _other_than(*fine: Any) -> Callable[[Any], bool]:
    return lambda value: bool(value) and value not in fine


def _names_weights(extra_config: Any) -> bool:
    """Whether the loaders' extra configuration has a place of one model's weights, which the other would load too."""
    with contextlib.suppress(TypeError, json.JSONDecodeError):  # SGLang's to refuse
        extra_config = json.loads(extra_config)
    places = ("presharded_path", "qlora_adapter_name_or_path", "pack_path", "source_path")
    return isinstance(extra_config, dict) and any(extra_config.get(place) for place in places)


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """A ServerArgs field that cannot be honoured beside a student.

    Attributes:
        field: its name.
        what: what it turns on.
        beside: which students.
        asks: whether a value turns it on.
    """

    field: str
    what: str
    beside: _Beside = _ANY
    asks: Callable[[Any], bool] = bool


_REFUSED = (
    _Refusal("enable_mixed_chunk", "mixing prefill and decode rows in one batch"),
    _Refusal("enable_two_batch_overlap", "two-batch overlap"),
    _Refusal("speculative_algorithm", "speculative decoding", _LOCKSTEP),
    _Refusal("speculative_algorithm", "speculative decoding", asks=_other_than(ALGORITHM)),
    _Refusal("decoupled_spec_role", "speculative decoding", asks=_other_than("null")),
    _Refusal("enable_dp_attention", "data-parallel attention"),
    _Refusal("enable_lora", "LoRA adapters", _NO_ADAPTER),
    _Refusal("lora_paths", "LoRA adapters", _NO_ADAPTER),
    # SGLang loads the adapters of scheduled requests ahead of their forward; the student's is none of those.
    _Refusal("enable_lora_overlap_loading", "loading adapters ahead", _ADAPTER),
    _Refusal("max_loras_per_batch", "fewer than 2 (the adapter, and no adapter)", _ADAPTER, lambda value: value < 2),
    _Refusal("enable_hierarchical_cache", "the hierarchical cache"),
    _Refusal("enable_lmcache", "LMCache"),
    _Refusal("enable_flexkv", "FlexKV"),
    _Refusal("enable_unified_cache_external_linker", "an external cache"),
    # Both keep the KV of scheduled requests elsewhere, and move it when the scheduler says so.
    _Refusal("enable_hisparse", "hierarchical sparse attention"),
    _Refusal("enable_unified_memory", "one memory for several KV pools"),
    _Refusal("radix_eviction_policy_config", "tuning the eviction of two radix caches", _OWN_WEIGHTS),
    _Refusal("enable_streaming_session", "streaming sessions"),
    _Refusal("enable_eplb", "expert load balancing"),
    _Refusal("ep_dispatch_algorithm", "expert load balancing"),
    _Refusal("init_expert_location", "expert load balancing", asks=_other_than("trivial")),
    _Refusal("expert_distribution_recorder_mode", "recording the load of experts"),
    _Refusal("expert_balancedness_report_mode", "recording the load of experts", asks=_other_than("off")),
    _Refusal("elastic_ep_backend", "elastic expert parallelism", asks=_other_than("none")),
    # The scheduler tells every rank the number of its tokens, without the students'.
    _Refusal("moe_a2a_backend", "all-to-all expert parallelism", asks=_other_than("none")),
    _Refusal("moe_dense_tp_size", "another tensor parallelism for dense layers"),
    _Refusal("kt_weight_path", "experts on the CPU", _OWN_WEIGHTS),
    # Rings beside the states of recurrent layers, which SGLang empties as it gives a request its slot.
    _Refusal("enable_linear_replayssm", "replaying recurrent states"),
    _Refusal("enable_linear_replayssm_spec", "replaying recurrent states"),
    _Refusal("enable_layernorm_sp", "sequence parallelism of layer norms", _OWN_WEIGHTS),
    _Refusal("enable_nvidia_megakernel", "a kernel for the whole of one model", _OWN_WEIGHTS),
    _Refusal("enable_amd_monokernel", "a kernel for the whole of one model", _OWN_WEIGHTS),
    _Refusal("enable_pdmux", "PD multiplexing"),
    _Refusal("disaggregation_mode", "PD disaggregation", asks=_other_than("null")),
    _Refusal("dllm_algorithm", "diffusion language models"),
    *(_Refusal(name, "a front end other than the HTTP server") for name in OTHER_FRONT_ENDS),
    _Refusal("grpc_port", "a front end other than the HTTP server"),
    # They would change the teacher's logits, or read what only scheduled rows have.
    _Refusal("enable_watermark", "watermarking"),
    _Refusal("enable_return_routed_experts", "returning the routed experts"),
    _Refusal("enable_return_indexer_topk", "returning the indexer's choices"),
    _Refusal("enable_return_aux_hidden_states", "returning auxiliary hidden states"),
    _Refusal("enable_return_hidden_states", "returning hidden states", _DRAFTING),
    _Refusal("return_hidden_states_mode", "returning hidden states", _DRAFTING),
    _Refusal("enable_deterministic_inference", "seeded sampling", _DRAFTING),
    _Refusal("kv_canary", "checking the KV cache with canaries", asks=_other_than("none")),
    # SGLang gives them to the model that it knows, and to no other.
    _Refusal("startup_weight_load_mode", "overlapped loading", _OWN_WEIGHTS, _other_than("serial")),
    _Refusal("checkpoint_engine_wait_weights_before_ready", "waiting for the teacher's weights alone", _OWN_WEIGHTS),
    # One source, place or layout of weights, which both models would use.
    _Refusal("load_format", "loading from a remote instance", _OWN_WEIGHTS, lambda value: value == "remote_instance"),
    _Refusal("load_format", "loading a GGUF file", _OWN_WEIGHTS, lambda value: value == "gguf"),
    _Refusal(
        "remote_instance_weight_loader_start_seed_via_transfer_engine", "being a remote instance's source", _OWN_WEIGHTS
    ),
    _Refusal("weight_cache_mode", "a cache of weights", _OWN_WEIGHTS, _other_than("off")),
    _Refusal("model_loader_extra_config", "a place of one model's weights", _OWN_WEIGHTS, _names_weights),
    _Refusal("quantization_param_path", "a file of one model's scaling factors", _OWN_WEIGHTS),
    _Refusal("modelopt_checkpoint_restore_path", "a place of one model's weights", _OWN_WEIGHTS),
    _Refusal("modelopt_checkpoint_save_path", "a place of one model's weights", _OWN_WEIGHTS),
    _Refusal("modelopt_export_path", "a place of one model's weights", _OWN_WEIGHTS),
    _Refusal("decrypted_config_file", "a configuration of one model", _OWN_WEIGHTS),
    _Refusal("model_checksum", "a list of one model's checksums", _OWN_WEIGHTS),
    _Refusal("offload_group_size", "offloading groups of layers", _OWN_WEIGHTS, lambda value: value > 0),
    _Refusal("debug_tensor_dump_output_folder", "dumping two models into one folder", _OWN_WEIGHTS),
    _Refusal("msprobe_dump_config", "dumping two models into one folder", _OWN_WEIGHTS),
)
_ONLY_ONE = ("pp_size", "attn_dp_size", "attn_cp_size", "dcp_size", "dwdp_size", "tokenizer_worker_num")
_SPECULATIVE = ("uno_lora_path", "enable_multi_layer_eagle", "spec_trace_dir")
"""SGLang's settings of drafting that do not begin with ``speculative_``."""
# (switch of SGLang's environment, what it turns on)
_REFUSED_ENVIRONMENT = (
    ("SGLANG_RUST_SERVER", "the Rust server"),
    ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "sizing KV pools after the graphs"),
    ("SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE", "an oracle in place of sampling"),
)


def check_sglang_version() -> None:
    """Refuse another SGLang than those this package is made for, before anything of it is imported.

    Raises:
        ValueError: names what is installed, what is supported, and the command that installs it.
    """
    supported = _supported_sglang()
    if supported is None:
        return  # run from a folder of sources, without having been installed
    try:
        installed = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("sglang") is not None:
            return  # the same for SGLang
        installed = "not installed"
    if installed == "not installed" or not supported.contains(Version(installed).public, prereleases=True):
        raise ValueError(
            f"sglang: {installed}, but this version of sglang-optimal works with sglang {supported} alone; "
            f"run: pip install 'sglang{supported}'"
        )


def _supported_sglang() -> SpecifierSet | None:
    """SGLang's releases in this package's own requirements; None where they are not known."""
    try:
        requirements = map(Requirement, importlib.metadata.requires("sglang-optimal") or ())
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((one.specifier for one in requirements if one.name == "sglang"), None)


class SelfCheckFailed(ValueError):
    """An engine's self-check found a fault, and printed it."""


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Start an engine within. Where that fails its other processes end too, those that multiprocessing started
    meanwhile: at its end the program would wait for them for ever.

    Raises:
        SelfCheckFailed: the self-check found a fault, which the scheduler prints before it leaves with status 2.
    """
    from sglang.srt.utils import kill_process_tree

    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - before:
            kill_process_tree(child.pid, wait_timeout=None)  # multiprocessing waits for it
        if isinstance(error, RuntimeError) and "(exit code: 2)" in str(error):
            raise SelfCheckFailed("the engine did not start: its self-check found a fault, printed above.") from error
        raise


def server_defaults(config: MixingConfig) -> dict[str, Any]:
    """ServerArgs values that mixing needs; empty without a student, so that the server is SGLang's own."""
    if not config.has_student:
        return {}
    defaults: dict[str, Any] = {"sampling_backend": "optimal", "radix_cache_backend": "optimal"}
    if config.student_lora_path is not None:
        defaults |= {"enable_lora": True, "lora_paths": [_adapter(config)], "max_loras_per_batch": 2}
        import torch

        if not torch.accelerator.is_available():
            defaults["lora_backend"] = "torch_native"
    return defaults


def _adapter(config: MixingConfig) -> dict[str, str | None]:
    """SGLang's record of the student's adapter."""
    return {"lora_name": STUDENT_ADAPTER, "lora_path": config.student_lora_path}


def checked_server_args(teacher: str, config: MixingConfig, arguments: dict[str, Any], where: str):
    """What a Python caller asks for, resolved, and checked together with both models; after `plugin.prepare`.

    Args:
        teacher: the teacher's path.
        config: the student and the defaults.
        arguments: of SGLang's ServerArgs, over what mixing needs.
        where: who was given them, for the message of an error.

    Returns:
        (SGLang's ServerArgs, the settled config)

    Raises:
        ValueError: names the argument and the fix.
    """
    check_sglang_version()
    from sglang.srt.server_args import ServerArgs

    config = config.resolved(teacher, arguments.get("revision"))
    check_known(arguments, ServerArgs.__struct_fields__, where)
    if "model_path" in arguments:
        raise ValueError("model_path: is the teacher; give it as the first argument.")
    if arguments.get("incremental_streaming_output"):
        raise ValueError(f"incremental_streaming_output: a stream of {where} yields all there is so far; leave it out.")
    parsed = ServerArgs(model_path=teacher, **{**server_defaults(config), **arguments})
    check_server_args(parsed, config)
    config = check_models(parsed, config)
    resolve(parsed, config)
    return parsed, config


def check_server_args(server_args, config: MixingConfig) -> None:
    """Refuse what a student cannot ride along with. Reads what the user gave, before SGLang resolves it.

    Raises:
        ValueError: names the flag and the fix.
    """
    if not config.has_student:
        return
    _check_features(server_args, config)
    _check_drafting(server_args)
    if config.student_lora_path is not None and server_args.lora_paths != [_adapter(config)]:
        raise ValueError("--lora-paths: no other adapter is supported beside --student-lora-path; remove the flag.")
    _check_chat_template(server_args, config)
    for name in ("sampling_backend", "radix_cache_backend"):
        value = getattr(server_args, name, None)
        if value not in (None, "optimal"):
            raise ValueError(f"{_flag(name)}: must stay unset or 'optimal' beside a student, got {value!r}.")
    from sglang.srt.environ import envs

    for name, what in _REFUSED_ENVIRONMENT:
        if getattr(envs, name).get():
            raise ValueError(f"{name}: {what} is not supported beside a student; unset it.")


def _check_chat_template(server_args, config: MixingConfig) -> None:
    """Of the guest's own template; SGLang says what is wrong with one when the models are loaded."""
    template, name = config.guest_chat_template, f"{config.guest}_chat_template"
    if template is None:
        return
    if server_args.skip_tokenizer_init:
        raise ValueError(f"{name}: has no effect with --skip-tokenizer-init; remove one of them.")
    from sglang.srt.parser.conversation import chat_template_exists

    from sglang_optimal.runtime.releases import python_chat_template_exists

    if template == OWN_TEMPLATE or chat_template_exists(template) or python_chat_template_exists(template):
        return
    if Path(template).suffix not in (".jinja", ".json") or not Path(template).is_file():
        raise ValueError(
            f"{name}: {template} is no name of SGLang's and no .jinja or .json file; give one of these, or "
            f"'{OWN_TEMPLATE}' for the model's own."
        )


def _check_features(server_args, config: MixingConfig) -> None:
    for refusal in _REFUSED:
        beside, flag = refusal.beside, _flag(refusal.field)
        # None: an older release has no such flag.
        if beside.applies(config) and refusal.asks(getattr(server_args, refusal.field, None)):
            raise ValueError(f"{flag}: {refusal.what} is not supported {beside.words}; {beside.instead}.")
    for name in _ONLY_ONE:
        value = getattr(server_args, name)
        if value not in (None, 1):
            raise ValueError(f"{_flag(name)}: only 1 is supported beside a student, got {value}; or {_PLAIN}.")


def _check_drafting(server_args) -> None:
    """SGLang's settings of its own drafting, which would be read by nobody or replaced by those of the student's."""
    unset = type(server_args)(model_path=server_args.model_path)
    for name in unset.__struct_fields__:
        ours = name.startswith("speculative_") and name != "speculative_algorithm"
        if (ours or name in _SPECULATIVE) and getattr(server_args, name) != getattr(unset, name):
            raise ValueError(
                f"{_flag(name)}: SGLang's own drafting is not supported beside a student, which drafts with "
                f"--mixing-mode and --draft-tokens; remove the flag, or {_PLAIN}."
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(server_args, config: MixingConfig) -> None:
    """Let SGLang fill in what the user left open, and refuse it as well where a student cannot ride along.

    Some models and attention backends bring a page size or a cache of their own.

    Raises:
        ValueError: as `check_server_args`, or SGLang's own message.
    """
    from sglang_optimal.runtime.configs.model_config import check_architectures

    if not hasattr(server_args, SETTLED):
        setattr(server_args, SETTLED, None)
    try:
        # Until it is resolved, SGLang's model configurations refuse 'unquant'.
        if config.student_model_path is not None and server_args.quantization != "unquant":
            check_architectures(server_args, config, resolved=False)
        if config.longest_draft:
            server_args.speculative_algorithm = ALGORITHM
            server_args.speculative_num_steps = config.longest_draft
            server_args.speculative_num_draft_tokens = config.longest_draft + 1
            server_args.speculative_eagle_topk = 1
        server_args.resolve_once()
    except (AssertionError, OSError) as error:  # a flag or a teacher that SGLang refuses
        if not str(error):
            raise
        raise ValueError(str(error)) from error
    check_resolved(server_args, config)


def check_resolved(server_args, config: MixingConfig) -> None:
    """Refuse what SGLang's resolution of the arguments brought and a student cannot ride along with.

    Raises:
        ValueError: as `check_server_args`.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    from sglang_optimal.runtime.configs.model_config import check_architectures

    cpu_ranks.share_cores(server_args.tp_size * server_args.dp_size, server_args.nnodes)
    if config.student_model_path is None:
        return
    view = resolving_view(server_args)
    try:
        _check_features(view, config)
    except ValueError as error:
        raise ValueError(f"{error} SGLang chose this for the model, the device or another flag.") from None
    if view.enable_memory_saver and not can_release(view.device):
        raise ValueError("--enable-memory-saver: the models are on the CPU, which has nothing to release; remove it.")
    if not config.shared_weights:
        _check_fused_all_reduces(view)
    check_architectures(server_args, config, resolved=True)


def can_release(device: str) -> bool:
    """Whether models on ``device`` can give their memory back and take it again."""
    return device != "cpu"


def _check_fused_all_reduces(view) -> None:
    """Refuse, before both models are loaded, a workspace of fused all-reduces that the worker cannot share.

    Raises:
        ValueError: names the flag and the fix.
    """
    if view.tp_size > 1 and view.flashinfer_allreduce_fusion_backend == "cutedsl":
        raise ValueError(
            "--flashinfer-allreduce-fusion-backend: two models cannot share the workspace of 'cutedsl'; "
            "give another, or --enforce-disable-flashinfer-allreduce-fusion."
        )


def check_models(server_args, config: MixingConfig) -> MixingConfig:
    """Check that both models exist and that both tokenizers agree on every id that both have.

    Returns:
        the configuration, with the ids that one of them alone has.

    Raises:
        ValueError: names the field and the first disagreement.
    """
    host_path = server_args.model_path
    if host_path.startswith(("/", "./", "../")) and not Path(host_path).exists():
        raise ValueError(f"--model-path: no model at {host_path}.")
    if config.student_model_path is None:
        return config
    path, flag = config.guest_path, f"--{config.guest}-model-path"
    if path != host_path or not Path(path).is_file():  # a served model of one file (GGUF) is SGLang's to judge
        _check_folder(flag, path, "config.json")
    if config.student_lora_path is not None:
        _check_folder("--student-lora-path", config.student_lora_path, "adapter_config.json")
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    def load(name: str, flag: str, revision: str | None):
        try:
            return get_tokenizer(name, trust_remote_code=bool(server_args.trust_remote_code), revision=revision)
        except Exception as error:
            raise ValueError(f"{flag}: cannot load a tokenizer from {name}: {error}") from None

    tokenizers = {
        config.host: load(server_args.tokenizer_path or host_path, "--model-path", server_args.revision),
        config.guest: load(path, flag, config.guest_revision),
    }
    try:
        found = Vocabularies.compared(tokenizers["teacher"].get_vocab(), tokenizers["student"].get_vocab())
    except ValueError as error:
        raise ValueError(
            f"{flag}: the {config.guest}'s tokenizer disagrees with the {config.host}'s: {error} "
            "Mixing needs the same token for every id; choose models of one family."
        ) from None
    if not found.of_one:
        return config
    logger.warning(
        "%d ids (%.2f %%) are tokens of both models; %d that one of them lacks are never sampled by a mixture.",
        found.common,
        100 * found.share,
        len(found.of_one),
    )
    return config.model_copy(update={"tokens_of_one": found.of_one})


def _check_folder(flag: str, path: str, file: str) -> None:
    """Refuse what looks like a folder and does not hold ``file``; everything else is the hub's to find."""
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).is_dir()
    if looks_local and not (Path(path).expanduser() / file).is_file():
        raise ValueError(f"{flag}: no {'adapter' if 'lora' in flag else 'model'} at {path} (no {file} there).")
