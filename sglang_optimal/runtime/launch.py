"""Start-up: what SGLang's Engine and HTTP server need to become ours, and the checks that come before any GPU work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_optimal.config import MixingConfig, check_known
from sglang_optimal.platforms import cpu_ranks

OTHER_FRONT_ENDS = ("encoder_only", "grpc_mode", "smg_grpc_mode", "use_ray")
"""ServerArgs fields that start something else than SGLang's HTTP server."""

ALGORITHM = "OPTIMAL"
"""SGLang's name of speculative mixing."""

STUDENT_ADAPTER = "student"
"""SGLang's name of the student's LoRA adapter; plain requests may ask for it with ``lora_path``."""

# (ServerArgs field, what it turns on), each off by default and refused beside a student
_REFUSED = (
    ("enable_mixed_chunk", "mixing prefill and decode rows in one batch"),
    ("enable_two_batch_overlap", "two-batch overlap"),
    ("speculative_algorithm", "speculative decoding"),
    ("enable_dp_attention", "data-parallel attention"),
    ("enable_lora", "LoRA adapters"),
    ("lora_paths", "LoRA adapters"),
    ("enable_hierarchical_cache", "the hierarchical cache"),
    ("enable_lmcache", "LMCache"),
    ("enable_flexkv", "FlexKV"),
    ("enable_unified_cache_external_linker", "an external cache"),
    ("enable_streaming_session", "streaming sessions"),
    ("enable_eplb", "expert load balancing"),
    ("ep_dispatch_algorithm", "expert load balancing"),
    ("expert_distribution_recorder_mode", "recording the load of experts"),
    ("enable_pdmux", "PD multiplexing"),
    ("dllm_algorithm", "diffusion language models"),
    *((name, "a front end other than the HTTP server") for name in OTHER_FRONT_ENDS),
)
# the same, refused only where the student drafts
_REFUSED_DRAFTING = (
    ("enable_deterministic_inference", "seeded sampling"),
    ("enable_return_hidden_states", "returning hidden states"),
    ("return_hidden_states_mode", "returning hidden states"),
)
_PLAIN = "give --student-weights none for a server that does not mix"
_ONLY_ONE = ("pp_size", "attn_dp_size", "attn_cp_size", "dcp_size", "tokenizer_worker_num", "page_size")


def server_defaults(config: MixingConfig) -> dict[str, Any]:
    """ServerArgs values that mixing needs; empty without a student, so that the server is SGLang's own."""
    if not config.mixes:
        return {}
    defaults: dict[str, Any] = {"sampling_backend": "optimal", "radix_cache_backend": "optimal"}
    if config.student_lora_path is not None:
        defaults |= {"enable_lora": True, "lora_paths": [_adapter(config)], "max_loras_per_batch": 2}
        import torch

        if not torch.accelerator.is_available():
            defaults["lora_backend"] = "torch_native"
    return defaults


def _adapter(config: MixingConfig) -> dict[str, str]:
    """SGLang's record of the student's adapter."""
    return {"lora_name": STUDENT_ADAPTER, "lora_path": config.student_lora_path}


def checked_server_args(teacher: str, config: MixingConfig, arguments: dict[str, Any], where: str):
    """What a Python caller asks for, resolved, and checked together with both models.

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
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    from sglang_optimal.runtime import plugin

    config = config.settled(teacher, arguments.get("revision"))
    check_known(arguments, ServerArgs.__struct_fields__, where)
    if "model_path" in arguments:
        raise ValueError("model_path: is the teacher; give it as the first argument.")
    load_plugins()
    plugin.register()
    parsed = ServerArgs(model_path=teacher, **{**server_defaults(config), **arguments})
    check_server_args(parsed, config)
    check_models(parsed, config)
    resolve(parsed, config)
    return parsed, config


def check_server_args(server_args, config: MixingConfig) -> None:
    """Refuse what a student cannot ride along with. Reads what the user gave, before SGLang resolves it.

    Raises:
        ValueError: names the flag and the fix.
    """
    if not config.mixes:
        return
    _check_features(server_args, config)
    if config.student_lora_path is not None and server_args.lora_paths != [_adapter(config)]:
        raise ValueError("--lora-paths: no other adapter is supported beside --student-lora-path; remove the flag.")
    for name in ("sampling_backend", "radix_cache_backend"):
        value = getattr(server_args, name, None)
        if value not in (None, "optimal"):
            raise ValueError(f"{_flag(name)}: must stay unset or 'optimal' beside a student, got {value!r}.")
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise ValueError("SGLANG_RUST_SERVER: the Rust server is not supported beside a student; unset it.")


def _check_features(server_args, config: MixingConfig) -> None:
    for name, what in _REFUSED:
        if config.student_lora_path is not None and name in ("enable_lora", "lora_paths"):
            continue
        if name == "speculative_algorithm" and config.longest_draft and getattr(server_args, name, None) == ALGORITHM:
            continue
        if getattr(server_args, name, None):
            raise ValueError(f"{_flag(name)}: {what} is not supported beside a student; remove the flag, or {_PLAIN}.")
    for name, what in _REFUSED_DRAFTING if config.longest_draft else ():
        if getattr(server_args, name, None):
            raise ValueError(f"{_flag(name)}: {what} is not supported where the student drafts; use lockstep mixing.")
    for name in _ONLY_ONE:
        value = getattr(server_args, name, 1)
        if value not in (None, 1):
            raise ValueError(f"{_flag(name)}: only 1 is supported beside a student, got {value}; or {_PLAIN}.")
    if getattr(server_args, "disaggregation_mode", "null") not in (None, "null"):
        raise ValueError(f"--disaggregation-mode: PD disaggregation is not supported beside a student; {_PLAIN}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(server_args, config: MixingConfig) -> None:
    """Let SGLang fill in what the user left open, and refuse it as well where a student cannot ride along.

    Some models and attention backends bring a page size or a cache of their own.

    Raises:
        ValueError: as `check_server_args`, or SGLang's own message.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    from sglang_optimal.runtime.architectures import check_architectures

    try:
        if config.student_model_path is not None:
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
    cpu_ranks.share_cores(server_args.tp_size * server_args.dp_size, server_args.nnodes)
    if config.student_model_path is None:
        return
    try:
        _check_features(resolving_view(server_args), config)
    except ValueError as error:
        raise ValueError(f"{error} SGLang chose this for the model, the device or another flag.") from None
    check_architectures(server_args, config, resolved=True)


def check_models(server_args, config: MixingConfig) -> None:
    """Check that both models exist and that both tokenizers agree on every real id.

    Raises:
        ValueError: names the field and the first disagreement.
    """
    teacher_path = server_args.model_path
    if teacher_path.startswith(("/", "./", "../")) and not Path(teacher_path).exists():
        raise ValueError(f"--model-path: no model at {teacher_path}.")
    path = config.student_model_path
    if path is None:
        return
    _check_folder("--student-model-path", path, "config.json")
    if config.student_lora_path is not None:
        _check_folder("--student-lora-path", config.student_lora_path, "adapter_config.json")
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    def load(name: str, flag: str, revision: str | None):
        try:
            return get_tokenizer(name, trust_remote_code=bool(server_args.trust_remote_code), revision=revision)
        except Exception as error:
            raise ValueError(f"{flag}: cannot load a tokenizer from {name}: {error}") from None

    teacher = load(server_args.tokenizer_path or teacher_path, "--model-path", server_args.revision)
    student = load(path, "--student-model-path", config.student_revision)
    difference = tokenizer_difference(teacher.get_vocab(), student.get_vocab())
    if difference is not None:
        raise ValueError(
            f"--student-model-path: the student's tokenizer disagrees with the teacher's: {difference} "
            "Mixing needs the same token for every id; choose models of one family."
        )


def _check_folder(flag: str, path: str, file: str) -> None:
    """Refuse what looks like a folder and does not hold ``file``; everything else is the hub's to find."""
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).is_dir()
    if looks_local and not (Path(path).expanduser() / file).is_file():
        raise ValueError(f"{flag}: no {'adapter' if 'lora' in flag else 'model'} at {path} (no {file} there).")


def tokenizer_difference(teacher: dict[str, int], student: dict[str, int]) -> str | None:
    """The first id that does not mean the same token in both vocabularies {token: id}; None when they agree.

    A vocabulary that is longer by added tokens alone also disagrees: the shorter model cannot read them.
    """
    by_id = [{index: token for token, index in vocab.items()} for vocab in (teacher, student)]
    for index in sorted(by_id[0].keys() | by_id[1].keys()):
        t, s = by_id[0].get(index), by_id[1].get(index)
        if t != s:
            return f"id {index} is {t!r} for the teacher and {s!r} for the student."
    return None
