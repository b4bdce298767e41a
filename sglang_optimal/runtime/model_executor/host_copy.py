"""Integers from the CPU to the device, without waiting for what the device still has to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.srt.utils import is_pin_memory_available


def sent(values: Sequence[int], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` as int64 tensors [n]: on the CPU, on the device.

    From pinned memory, because a copy from other memory may wait until the device has caught up.
    """
    host = torch.tensor(values, dtype=torch.int64, pin_memory=is_pin_memory_available(device))
    return host, host.to(device, non_blocking=True)
