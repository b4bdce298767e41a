"""SGLang on plain PyTorch CPU kernels: the real scheduler, radix cache and overlap loop, without native kernels."""

from __future__ import annotations

import functools

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU as an out-of-tree platform.

    SGLang's in-tree CPU engine needs compiled kernels that its PyPI wheel does not carry; an out-of-tree platform takes
    the generic paths instead (torch-native attention, ``forward_native`` layers).
    """

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device=None) -> bool:
        return False

    def get_device(self, device_id: int = 0) -> str:
        # SGLang's argument resolution wants the name (it splits off an index).
        return "cpu"


def ignore_pinned_memory() -> None:
    """Let code that pins host memory run where there is no accelerator to pin it for, and PyTorch therefore refuses.

    SGLang's LoRA layers pin without asking. For a process without an accelerator only; it then applies to all of it.
    """

    def unpinned(create):
        @functools.wraps(create)
        def wrapper(*args, pin_memory: bool = False, **kwargs):
            return create(*args, **kwargs)

        return wrapper

    torch.tensor, torch.zeros = unpinned(torch.tensor), unpinned(torch.zeros)
    torch.Tensor.pin_memory = lambda self, device=None: self
