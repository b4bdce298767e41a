"""SGLang's layers on a CPU: norms and rotations in one pass.

The layers' plain PyTorch versions stay what runs for every case that is not named here.
"""

from __future__ import annotations

from typing import Any

from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from torch import Tensor, int64

from sglang_optimal.platforms import cpu_kernels


def register(platform_key: str) -> None:
    """Let the layers of a platform's processes run what is here."""
    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm_forward, platform_key)
    for layer in (RotaryEmbedding, Llama3RotaryEmbedding):
        BaseFusedOp.register_oot_forward(layer, rotary_forward, platform_key)


def rms_norm_forward(
    layer: RMSNorm, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None, *args: Any
) -> Any:
    """``RMSNorm.forward_native`` of a batch of tokens, in one pass."""
    weight = layer.weight
    tensors = (x, weight) if residual is None else (x, weight, residual)
    if (
        x.dim() != 2
        or not cpu_kernels.is_plain(*tensors)
        or post_residual_addition is not None
        or layer.variance_size_override is not None
        or layer.cast_x_before_out_mul
        or layer.fp32_residual
        or layer.override_orig_dtype is not None
        or x.shape[1] != layer.hidden_size
    ):
        return layer.forward_native(x, residual, post_residual_addition, *args)
    if residual is None:
        return cpu_kernels.rms_norm(x, weight, layer.variance_epsilon)
    return cpu_kernels.sum_rms_norm(x, residual, weight, layer.variance_epsilon)


def rotary_forward(
    layer: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """``RotaryEmbedding.forward_native`` of a batch of tokens, in one pass."""
    table = layer.cos_sin_cache
    plain = (
        not args
        and not any(value is not None for value in kwargs.values())
        and not hasattr(layer, "sin_cos_cache")
        and positions.dim() == 1
        and positions.dtype is int64
        and positions.is_contiguous()
        and cpu_kernels.is_plain(table)
        and table.shape[1] == layer.rotary_dim
        and all(t.dim() == 2 and t.stride(1) == 1 and t.dtype is table.dtype for t in (query, key))
    )
    if not plain:
        return layer.forward_native(positions, query, key, *args, **kwargs)
    how = positions, table, layer.head_size, layer.is_neox_style
    return cpu_kernels.rotate(query, *how), cpu_kernels.rotate(key, *how)
