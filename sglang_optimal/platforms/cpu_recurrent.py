"""Recurrent layers in plain PyTorch, where SGLang has Triton kernels: short convolutions and gated delta nets.

As small as they can be, token by token: for tests and for trying things, not for speed. States are what their pool has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus

_CHUNK = 64  # FLA's, which SGLang counts on
MODELS = (
    "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM",
)  # fmt: skip
"""Architectures that need nothing else of a GPU."""
_LAYERS = ("RadixLinearAttention", "ShortConv")


def _activated(x: Tensor, activation: Any) -> Tensor:
    return silu(x) if activation in ("silu", "swish", True) else x


def _sequences(query_start_loc: Tensor, cache_indices: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(number, begin, end, slot) of those that have tokens and a slot."""
    bounds, slots = query_start_loc.tolist(), cache_indices.tolist()
    for number, slot in enumerate(slots[: len(bounds) - 1]):
        if slot >= 0 and bounds[number + 1] > bounds[number]:
            yield number, bounds[number], bounds[number + 1], slot


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_states: Tensor, query_start_loc: Tensor, *_,
    cache_indices: Tensor, has_initial_state: Tensor | None = None, activation: Any = "silu", **__,
) -> Tensor:  # fmt: skip
    """Depthwise causal convolution of several sequences.

    Args:
        x: [D, tokens]. weight: [D, W]. conv_states: [slots, D, W − 1], written: the last inputs of each sequence.
        query_start_loc: [n + 1]. cache_indices: [n] slots. has_initial_state: [n] bool, whether a sequence goes on.

    Returns:
        [D, tokens].
    """
    out, kept = torch.zeros_like(x), weight.shape[1] - 1
    for number, begin, end, slot in _sequences(query_start_loc, cache_indices):
        goes_on = has_initial_state is not None and bool(has_initial_state[number])
        before = conv_states[slot].to(x.dtype) if goes_on else x.new_zeros(len(x), kept)
        inputs = torch.cat([before, x[:, begin:end]], -1)
        out[:, begin:end] = conv1d(inputs.unsqueeze(0), weight.unsqueeze(1), bias, groups=len(x))[0]
        conv_states[slot] = inputs[:, -kept:].to(conv_states.dtype)
    return _activated(out, activation)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, *_,
    conv_state_indices: Tensor, **__,
) -> Tensor:  # fmt: skip
    """One token of each sequence: x [n, D], out [n, D]; the rest as `causal_conv1d_fn`."""
    rows, kept = conv_state_indices.clamp(min=0).long(), weight.shape[1] - 1
    inputs = torch.cat([conv_state[rows][..., -kept:].to(x.dtype), x.unsqueeze(-1)], -1)
    there = conv_state_indices >= 0
    conv_state[rows[there]] = inputs[there][..., 1:].to(conv_state.dtype)
    out = (inputs * weight).sum(-1)
    return _activated(out if bias is None else out + bias, activation)


def fused_gdn_gating(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    """(log decay, β) [1, tokens, heads] float32 of gated delta nets (arXiv:2412.06464)."""
    decay = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
    return decay.unsqueeze(0), b.float().sigmoid().unsqueeze(0)


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Iterator[Tensor]:
    """The outputs [HV, V] of one sequence's tokens, float32; ``state`` [HV, V, K] goes on with them.

    Args:
        q, k: [tokens, H, K], H dividing HV. v: [tokens, HV, V]. g, beta: [tokens, HV].
    """
    share = v.shape[1] // k.shape[1]
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q.float(), k.float()))
    q, k = ((x * scale).repeat_interleave(share, 1) for x, scale in ((q, q.shape[-1] ** -0.5), (k, 1.0)))
    for t in range(len(v)):
        state *= g[t].exp()[:, None, None]
        change = (v[t].float() - torch.einsum("hvk,hk->hv", state, k[t])) * beta[t][:, None]
        state += change.unsqueeze(-1) * k[t].unsqueeze(1)
        yield torch.einsum("hvk,hk->hv", state, q[t])


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, initial_state: Tensor, initial_state_indices: Tensor,
    cu_seqlens: Tensor, **_,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    """Gated delta rule over prompts: all [1, tokens, heads, …]; ``initial_state`` [slots, HV, V, K], written.

    Returns:
        (outputs, None, [1, chunks, HV, V, K] the states before every 64 tokens of each sequence).
    """
    out, before = torch.zeros_like(v), []
    for _number, begin, end, slot in _sequences(cu_seqlens, initial_state_indices):
        state = initial_state[slot].float()
        for start in range(begin, end, _CHUNK):
            before.append(state.clone())
            part = slice(start, min(start + _CHUNK, end))
            tokens = _delta_rule(q[0, part], k[0, part], v[0, part], g[0, part], beta[0, part], state)
            out[0, part] = torch.stack(list(tokens)).to(out.dtype)
        initial_state[slot] = state.to(initial_state.dtype)
    return out, None, torch.stack(before).unsqueeze(0)


def fused_sigmoid_gating_delta_rule_update(
    *, A_log: Tensor, a: Tensor, dt_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor,
    initial_state_source: Tensor, initial_state_indices: Tensor, cu_seqlens: Tensor, **_,
) -> Tensor:  # fmt: skip
    """One token of each sequence of `chunk_gated_delta_rule`, with the gates of `fused_gdn_gating`."""
    g, beta = fused_gdn_gating(A_log, a.view(-1, a.shape[-1]), b.view(-1, b.shape[-1]), dt_bias)
    return chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=initial_state_source, initial_state_indices=initial_state_indices,
        cu_seqlens=cu_seqlens,
    )[0]  # fmt: skip


def rms_norm_gated(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, eps: float) -> Tensor:
    """norm(x) · weight · silu(z), float32 within."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    wide = wide if bias is None else wide + bias.float()
    return (wide if z is None else wide * silu(z.float())).to(x.dtype)


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: Tensor, mixed_ba: Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qwen3.5's projections apart: (q, k, v [tokens, …], z [tokens, heads, V], b and a [tokens, heads])."""
    size = 2 * num_heads_qk * head_qk + num_heads_v * head_v
    qkv, z = mixed_qkvz[:, :size].contiguous(), mixed_qkvz[:, size:].reshape(-1, num_heads_v, head_v)
    b, a = mixed_ba[:, :num_heads_v].contiguous(), mixed_ba[:, num_heads_v:].contiguous()
    return qkv, z, b, a


def fused_sigmoid_mul(attn_output: Tensor, gate: Tensor, *_, **__) -> Tensor:
    """attn_output · σ(gate), of Qwen3.5's gated attention."""
    return attn_output * gate.reshape(attn_output.shape).float().sigmoid().to(attn_output.dtype)


def track_mamba_states_all_layers(
    conv_states_pool: Tensor, ssm_states_pool: Tensor, cache_indices: Tensor, mamba_track_mask: Tensor,
    mamba_track_indices: Tensor, batch_size: int, *_, **__,
) -> None:  # fmt: skip
    """Keep the states [layers, slots, …] of the rows that a radix cache asks for, in slots of their own."""
    rows = mamba_track_mask[:batch_size].nonzero(as_tuple=True)[0]
    kept, now = mamba_track_indices[rows].long(), cache_indices[rows].long()
    for states in (conv_states_pool, ssm_states_pool):
        states[:, kept] = states[:, now]


def track_mamba_states_if_needed(conv_states: Tensor, ssm_states: Tensor, *args, **kwargs) -> None:
    """The same of one layer's [slots, …]."""
    track_mamba_states_all_layers(conv_states.unsqueeze(0), ssm_states.unsqueeze(0), *args, **kwargs)


def is_recurrent(model: torch.nn.Module) -> bool:
    return any(type(module).__name__.endswith(_LAYERS) for module in model.modules())


def install() -> None:
    """Put these in place of SGLang's kernels, wherever its modules have taken them."""
    from sglang.kernels.ops.attention import triton_gdn_fused_proj
    from sglang.kernels.ops.attention.fla import layernorm_gated
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.kernels.ops.mamba import mamba_state_scatter_triton
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.layers.attention.linear.kernels import gdn_triton
    from sglang.srt.layers.attention.mamba import causal_conv1d

    for module, ours in (
        (causal_conv1d, causal_conv1d_fn),
        (causal_conv1d, causal_conv1d_update),
        (gdn_backend, causal_conv1d_fn),
        (gdn_backend, causal_conv1d_update),
        (gdn_backend, fused_gdn_gating),
        (gdn_triton, chunk_gated_delta_rule),
        (gdn_triton, fused_sigmoid_gating_delta_rule_update),
        (triton_gdn_fused_proj, fused_qkvzba_split_reshape_cat_contiguous),
        (elementwise, fused_sigmoid_mul),
        (mamba_state_scatter_triton, track_mamba_states_all_layers),
        (mamba_state_scatter_triton, track_mamba_states_if_needed),
    ):
        replace(getattr(module, ours.__name__), ours)
    gdn_triton.TritonGDNKernel.supports_packed_decode = False
    layernorm_gated.RMSNorm.forward = _forward_gated


def _forward_gated(norm: Any, x: Tensor, z: Tensor | None = None) -> Tensor:
    """Of FLA's ``RMSNorm``, as gated delta nets have it.

    Raises:
        NotImplementedError: it is another kind, of a model that is not among `MODELS`.
    """
    if not norm.norm_before_gate or norm.group_size is not None or norm.activation != "swish":
        raise NotImplementedError("a gated norm with groups, another activation or the gate first needs a GPU")
    return rms_norm_gated(x, norm.weight, norm.bias, z, norm.eps)


def replace(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Put ``ours`` wherever a module of SGLang's has taken the function of the same name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and getattr(module, ours.__name__, None) is theirs:
            setattr(module, ours.__name__, ours)
