"""What ``--dtype auto`` is on a CPU."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.25
"""The largest part of this machine's memory for one model in float32: there may be two, each packed once more."""


@functools.cache
def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor (AVX-512 at least)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def chosen(model_path: str, revision: str | None, quantization: str | None) -> str:
    """``float32`` where the processor has no instructions for bfloat16, else SGLang's ``auto``.

    PyTorch multiplies bfloat16 there an element at a time: 21 tokens/s of a mixture at batch 48 instead of 109, on an
    AMD EPYC with AVX2. Weights in half precision are the same numbers in float32. Models that are quantized, not on
    this disk, or too large for the memory in float32 stay as they are.
    """
    if has_bfloat16() or quantization is not None:
        return "auto"
    from sglang_optimal.local_model import model_folder

    folder = model_folder(model_path, revision)
    if folder is None or _is_quantized(folder):
        return "auto"
    size = 2 * sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    if not size:
        return "auto"
    if size > _SHARE_OF_MEMORY * psutil.virtual_memory().total:
        logger.warning(
            "dtype: this processor is slow in half precision; in float32, which it does faster, %s takes %.0f GB: "
            "--dtype float32 where there is memory for it.", model_path, size / 1e9,
        )  # fmt: skip
        return "auto"
    logger.info(
        "dtype: float32, which this processor does faster than half precision; --dtype bfloat16 takes less memory."
    )
    return "float32"


def _is_quantized(folder: Path) -> bool:
    """True as well where that cannot be told; SGLang says what is wrong."""
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return True
