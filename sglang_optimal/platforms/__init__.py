"""Platform plugin: lets an unmodified SGLang run on a machine that has no accelerator."""

from __future__ import annotations

import os


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``.

    Returns the qualified name of the platform class when no accelerator is present, else None, so that SGLang
    falls back to its own platform. An explicit ``SGLANG_USE_CPU_ENGINE=1`` asks for SGLang's own CPU engine.
    """
    import torch

    if os.getenv("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.accelerator.is_available():
        return None
    return "sglang_optimal.platforms.torch_cpu.TorchCpuSRTPlatform"
