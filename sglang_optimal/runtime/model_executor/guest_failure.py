"""A forward of the guest's that raises: its requests end with a message, and the others go on."""

from __future__ import annotations

import logging

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_optimal.runtime.core import MixedRows

logger = logging.getLogger(__name__)


def guest_failure(error: Exception, rows: MixedRows) -> str:
    """What to tell the requests whose guest's forward raised ``error``; raises it again if nothing can go on.

    That is so where other ranks wait for this one, and where the accelerator itself has failed.
    """
    if get_parallel().tp_size > 1 or isinstance(error, torch.AcceleratorError):
        raise error
    side = rows.reqs[0].mixing.guest.model
    logger.error("%s forward", side, exc_info=error)
    for req in rows.reqs:
        if req.mixing.guest.kv is not None:  # else it has just ended
            req.mixing.guest.kv.failed = True
    return f"the {side}'s forward failed: {type(error).__name__}: {error}"


def no_logits(rows: MixedRows, vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """[n, vocab_size] of NaN, in place of what a failed forward would have given; ends the requests."""
    return torch.full((len(rows.row_ids), vocab_size), torch.nan, device=device)
