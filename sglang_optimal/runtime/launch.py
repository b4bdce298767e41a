"""Start-up: what SGLang's Engine and HTTP server need to become ours, and the checks that come before any GPU work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_optimal.config import MixingConfig

# (ServerArgs field, its harmless value, why it is refused beside a student)
_REFUSED = (
    ("enable_mixed_chunk", False, "mixing prefill and decode rows in one batch"),
    ("speculative_algorithm", None, "speculative decoding"),
    ("enable_dp_attention", False, "data-parallel attention"),
    ("enable_lora", None, "LoRA adapters"),
    ("enable_hierarchical_cache", False, "the hierarchical cache"),
    ("enable_streaming_session", False, "streaming sessions"),
    ("enable_pdmux", False, "PD multiplexing"),
    ("dllm_algorithm", None, "diffusion language models"),
)


def server_defaults(config: MixingConfig) -> dict[str, Any]:
    """ServerArgs values that mixing needs; empty without a student, so that the server is SGLang's own."""
    if config.student_model_path is None:
        return {}
    return {"sampling_backend": "optimal", "radix_cache_backend": "optimal"}


def check_server_args(server_args, config: MixingConfig) -> None:
    """Refuse what a student cannot ride along with.

    Raises:
        ValueError: names the flag and the fix.
    """
    if config.student_model_path is None:
        return
    for name, harmless, what in _REFUSED:
        value = getattr(server_args, name, harmless)
        if value not in (harmless, False):
            raise ValueError(f"--{name.replace('_', '-')}: {what} is not supported beside a student; remove the flag.")
    for name in ("pp_size", "tokenizer_worker_num"):
        if getattr(server_args, name, 1) not in (None, 1):
            raise ValueError(f"--{name.replace('_', '-')}: only 1 is supported beside a student.")
    if (getattr(server_args, "page_size", None) or 1) != 1:
        raise ValueError("--page-size: only 1 is supported beside a student.")
    if getattr(server_args, "disaggregation_mode", "null") not in (None, "null"):
        raise ValueError("--disaggregation-mode: PD disaggregation is not supported beside a student.")
    for name in ("sampling_backend", "radix_cache_backend"):
        value = getattr(server_args, name, None)
        if value not in (None, "optimal"):
            raise ValueError(f"--{name.replace('_', '-')}: must stay unset or 'optimal' beside a student, got {value!r}.")


def check_models(server_args, config: MixingConfig) -> None:
    """Check that the student exists and that both tokenizers agree on every real id.

    Raises:
        ValueError: names the field and the first disagreement.
    """
    path = config.student_model_path
    if path is None:
        return
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(f"--student-model-path: no model at {path} (no config.json there).")
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    def load(name: str, flag: str, revision: str | None):
        try:
            return get_tokenizer(name, trust_remote_code=bool(server_args.trust_remote_code), revision=revision)
        except Exception as error:
            raise ValueError(f"{flag}: cannot load a tokenizer from {name}: {error}") from None

    teacher = load(server_args.tokenizer_path or server_args.model_path, "--model-path", server_args.revision)
    student = load(path, "--student-model-path", config.student_revision)
    difference = tokenizer_difference(teacher.get_vocab(), student.get_vocab())
    if difference is not None:
        raise ValueError(
            f"--student-model-path: the student's tokenizer disagrees with the teacher's: {difference} "
            "Mixing needs the same token for every id; choose models of one family."
        )


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
