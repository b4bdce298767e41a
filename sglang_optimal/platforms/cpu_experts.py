"""The shared expert of Qwen's mixtures of experts in plain PyTorch, where SGLang has a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_optimal.platforms.cpu_recurrent import replace


def fused_gate_sigmoid_mul_add(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor
) -> None:
    """final_hidden_states += σ(hidden_states · gate_weight) · shared_output, in float32.

    Args:
        hidden_states, shared_output, final_hidden_states: [tokens, D]; the last is written. gate_weight: [D].
    """
    gate = (hidden_states.float() @ gate_weight.float()).sigmoid().unsqueeze(-1)
    final_hidden_states.copy_(gate * shared_output.float() + final_hidden_states.float())


def install(model: torch.nn.Module) -> None:
    """Put it in place of SGLang's, if the model has such experts."""
    if any(type(module).__name__ == "Qwen2MoeSparseMoeBlock" for module in model.modules()):
        from sglang.kernels.ops.elementwise import elementwise

        replace(elementwise.fused_gate_sigmoid_mul_add, fused_gate_sigmoid_mul_add)
