"""What ``--dtype auto`` is on a CPU."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)

_SHARE_OF_MEMORY = 0.25
"""The largest part of this machine's memory for one model in float32: there may be two, each packed once more."""


@functools.cache
def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor (AVX-512 at least)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def has_float16() -> bool:
    """Whether oneDNN multiplies float16 on this processor (AVX-512 FP16 or AMX)."""
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def chosen(model_path: str, revision: str | None, quantization: str | None) -> str:
    """``float32`` where the processor has no instructions for what SGLang's ``auto`` would be, else ``auto``.

    PyTorch multiplies such a type an element at a time: 21 tokens/s of a mixture at batch 48 instead of 109, on an
    AMD EPYC with AVX2 in bfloat16. Weights in half precision are the same numbers in float32; those that are in float32
    SGLang would round to float16. Models that are quantized, not on this disk, or too large for the memory in float32
    stay as they are.
    """
    if quantization is not None or (has_bfloat16() and has_float16()):
        return "auto"
    from sglang_optimal.local_model import model_folder

    folder = model_folder(model_path, revision)
    if folder is None:
        return "auto"
    config = _config(folder)
    if not config or "quantization_config" in config:
        return "auto"
    stored, automatic = _dtypes(config)
    does_it_well = has_float16() if automatic is torch.float16 else has_bfloat16()
    if does_it_well:
        return "auto"
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    size = size * torch.float32.itemsize // stored.itemsize
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


def _dtypes(config: dict[str, Any]) -> tuple[torch.dtype, torch.dtype]:
    """(of the checkpoint, what SGLang's ``auto`` makes of it)."""
    inner = config.get("text_config") or {}
    name = config.get("dtype") or config.get("torch_dtype") or inner.get("dtype") or inner.get("torch_dtype")
    stored = {"bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16}.get(str(name), torch.float32)
    if stored is not torch.float32:
        return stored, stored
    return stored, torch.bfloat16 if str(config.get("model_type")).startswith("gemma") else torch.float16


def _config(folder: Path) -> dict[str, Any]:
    """Of the model; empty where it cannot be read: SGLang says what is wrong."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
