"""What people use today instead of this package, written as a careful user would write it.

transformers_loop: two Hugging Face models in a loop of one's own. nested: stock SGLang whose logits processor asks a
second stock SGLang server. distance: how far the nested design's distribution is from q*.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BISECTIONS = 20  # to 2^-20, about 1e-6


def bisect_alpha(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """Alpha with KL(q‖student) = KL(q‖teacher), by plain bisection in [0, 1].

    Args:
        log_teacher, log_student: [B, N] float32 log-probabilities, finite.

    Returns:
        [B, 1] float32, the teacher's weight.
    """
    delta = log_teacher - log_student
    low = torch.zeros_like(delta[:, :1])
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        q = torch.softmax(log_student + middle * delta, dim=-1)
        below = (q * delta).sum(-1, keepdim=True) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
