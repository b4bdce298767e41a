"""From one value a token to one loss."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_optimal.train.checks import check_choice, check_shape

REDUCTIONS = ("token", "sequence", "sum", "none")


def reduce(values: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """Reduce values of tokens.

    Args:
        values: [B, L].
        mask: [B, L] bool or 0/1, True at the tokens of the completion; None: all.
        reduction: ``token``: the mean over all tokens of the batch (TRL's ``bnpo``, GKD's ``batchmean``).
            ``sequence``: the mean over sequences of each one's mean over its tokens (TRL's ``grpo``). ``sum``: over all
            tokens. ``none``: [B, L], 0 where masked.

    Returns:
        A scalar, or [B, L]. Without any token it is 0. What is masked has no gradient, even where it is infinite.

    Raises:
        ValueError: an unknown reduction, or a mask of another shape.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    check_shape("mask", mask, values, "the positions")
    mask = mask.bool()
    values = torch.where(mask, values, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "token":
        return values.sum() / mask.sum().clamp(min=1)
    if values.ndim < 2:
        raise ValueError(f"reduction: sequence needs values of [B, L], got {list(values.shape)}.")
    lengths = mask.sum(-1)
    means = values.sum(-1) / lengths.clamp(min=1)
    return means.sum() / (lengths > 0).sum().clamp(min=1)
