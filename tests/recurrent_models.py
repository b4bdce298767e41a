"""Tiny random models with recurrent layers: every other layer has a state in place of KV."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import build_small_tokenizer, copy_tokenizer, randomize

DELTA_NETS = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
_CONVOLUTIONS = {"conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5, "block_auto_adjust_ff_dim": False}
_MAMBA = {
    "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_chunk_size": 64, "mamba_rms_norm": True, "head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5TextConfig", "linear_attention", DELTA_NETS),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", "linear_attention", {**DELTA_NETS, **EXPERTS}),
    "lfm2": ("Lfm2Config", "conv", _CONVOLUTIONS),
    "lfm2-moe": ("Lfm2MoeConfig", "conv", {**_CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1}),
}
"""{name: (transformers' configuration, its recurrent layers' type, what it needs beside the common sizes)}."""
GPU_FAMILIES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "qwen3-next": ("Qwen3NextConfig", "linear_attention", {**DELTA_NETS, **EXPERTS, "decoder_sparse_step": 1}),
    "falcon-h1": ("FalconH1Config", None, _MAMBA),
}
"""The same of those that the CPU platform has no kernels for; None: every layer has both."""
ENVIRONMENT = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}
"""SGLang keeps the last inputs of convolutions in bfloat16, which is not what the oracle does."""


def build_tiny_recurrent_model(
    path: Path, *, seed: int, family: str, num_layers: int = 4, hidden_size: int = 64, vocab_size: int = 64
) -> Path:
    """A random float32 model with the 64-token tokenizer at ``path``."""
    kind, recurrent, more = (FAMILIES | GPU_FAMILIES)[family]
    if recurrent is not None:
        more = {"layer_types": [recurrent, "full_attention"] * (num_layers // 2), **more}
    config = getattr(transformers, kind)(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, dtype=torch.float32,
        **more,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    gates = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    randomize(model, seed=seed, logit_std=1.5, embedding_std=1.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in gates:
                weight.copy_(gates[name])
            elif "norm" in name and family.startswith("qwen3.5") and "linear_attn" not in name:
                weight.fill_(0.0)  # its norms scale by 1 + weight
            elif "conv1d" in name or "conv.conv" in name:
                weight.mul_(3)  # as the others, over the few inputs that it sees
    model.to(torch.float32).save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**written, "full_attention_interval": 2}))  # as published
    with tempfile.TemporaryDirectory() as scratch:
        copy_tokenizer(build_small_tokenizer(Path(scratch)), path)
    return path
