"""Which models can be teacher or student; the others are refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import ModelConfig

from sglang_optimal.config import MixingConfig
from sglang_optimal.platforms.cpu_recurrent import MODELS as CPU_MODELS

# (whether a model is of this kind, what to call it)
_REFUSED: tuple[tuple[Callable[[ModelConfig], bool], str], ...] = (
    (lambda model: not model.is_generation, "an embedding or reward model"),
    (lambda model: model.is_encoder_decoder, "an encoder-decoder model"),
)
_REFUSED_POOLS = (
    (
        lambda model: model.is_hybrid_swa,
        "a model whose sliding-window layers have a KV pool of their own (try --disable-hybrid-swa-memory)",
    ),
)


def is_recurrent(model: ModelConfig) -> bool:
    """Whether some of its layers have a state in place of KV (Mamba, gated delta nets, short convolutions)."""
    return mambaish_config(model) is not None


def guest_model_config(server_args, path: str, revision: str | None) -> ModelConfig:
    """SGLang's configuration of the guest; ``revision`` None: the hub's main one, whatever the host's is."""
    return ModelConfig.from_server_args(server_args, model_path=path, model_revision=revision or "main")


def check_architectures(server_args, config: MixingConfig, *, resolved: bool) -> None:
    """Refuse models that cannot be one side of a mixture.

    Args:
        server_args: SGLang's.
        config: the student, settled.
        resolved: whether SGLang has filled in what the user left open; some answers depend on it.

    Raises:
        ValueError: names the flag, the architecture and the reason.
    """
    sides = {"--model-path": lambda: ModelConfig.from_server_args(server_args)}
    if not config.shared_weights:
        path, revision = config.guest_path, config.guest_revision
        sides[f"--{config.guest}-model-path"] = lambda: guest_model_config(server_args, path, revision)
    on_cpu = resolved and resolving_view(server_args).device == "cpu"
    for flag, read in sides.items():
        try:
            model = read()
        except Exception as error:  # whatever transformers and SGLang find wrong with it
            raise ValueError(f"{flag}: {error}") from error
        for refused, what in (*_REFUSED, *_REFUSED_POOLS) if resolved else _REFUSED:
            if refused(model):
                name = model.hf_config.architectures[0]
                raise ValueError(f"{flag}: {name} is {what}, which is not supported beside a student.")
        if is_recurrent(model):
            _check_recurrent(config, model, flag, on_cpu)
        if on_cpu:
            _check_cpu_attention(model, flag)
        if resolved and flag != "--model-path":
            _check_quantization(server_args, config, model)


def _check_recurrent(config: MixingConfig, model: ModelConfig, flag: str, on_cpu: bool) -> None:
    """A state has no positions: what has gone into it cannot be taken back, and each context needs one of its own."""
    name = model.hf_config.architectures[0]
    refused = (
        f"{flag}: {name} is a model with recurrent layers (Mamba, linear attention, short convolutions), which is not "
        "supported beside a student"
    )
    if config.longest_draft:
        raise ValueError(f"{refused} that drafts, or that is drafted for; give --mixing-mode lockstep.")
    if on_cpu and name not in CPU_MODELS:
        raise ValueError(f"{refused} on a CPU, where there are {', '.join(CPU_MODELS)}; run it on a GPU.")


def _check_cpu_attention(model: ModelConfig, flag: str) -> None:
    """SGLang's attention for CPUs leaves a cap on scores out, without a word."""
    cap = getattr(model.hf_text_config, "attn_logit_softcapping", None)
    if cap:
        raise ValueError(
            f"{flag}: {model.hf_config.architectures[0]} caps its attention scores (attn_logit_softcapping: {cap:g}), "
            "which SGLang's attention for CPUs leaves out; it is not supported beside a student on a CPU."
        )


def _check_quantization(server_args, config: MixingConfig, guest: ModelConfig) -> None:
    """SGLang loads both models with one --quantization, and for some teachers it chooses it itself."""
    chosen = resolving_view(server_args).quantization
    own = getattr(guest.hf_config, "quantization_config", None)
    if chosen is not None and server_args.quantization is None and own is None:
        raise ValueError(
            f"--{config.guest}-model-path: SGLang chose --quantization {chosen} for the {config.host}, and would "
            f"quantize the {config.guest} with it as well; give --quantization unquant, or a {config.guest} of the "
            "same format."
        )
