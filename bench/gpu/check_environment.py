"""What the machine is, what it moves and multiplies, and whether SGLang's kernels load and are right on it.

    python -m bench.gpu.check_environment [--output FILE]

Writes one JSON object. The exit status is 1 if anything on a GPU failed; without a GPU those parts are skipped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("sglang", "sglang-kernel", "sgl-kernel", "triton", "flashinfer-python", "transformers", "numba", "numpy")
TOOLS = ("nvcc", "g++", "ninja", "compute-sanitizer")


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()[:600]


def nvidia_smi() -> str:
    fields = "name,memory.total,memory.used,driver_version,clocks.sm,clocks.max.sm,power.limit"
    return command("nvidia-smi", f"--query-gpu={fields}", "--format=csv")


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median of the device's time."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": properties.L2_cache_size / 1e6,
    }


def copy() -> dict[str, float]:
    a = torch.randn(1 << 31, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    ms = milliseconds(lambda: b.copy_(a))
    return {"ms": ms, "gb_per_s_read_and_written": 2 * a.numel() * a.element_size() / ms / 1e6}


def product() -> dict[str, float]:
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ms = milliseconds(lambda: a @ b)
    return {"ms": ms, "tflop_per_s": 2 * 8192**3 / ms / 1e9}


def plugins() -> str:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.platforms import current_platform

    return type(current_platform).__name__


def _close(got: torch.Tensor, expected: torch.Tensor, limit: float = 1e-2) -> float:
    error = float((got.float() - expected).norm() / expected.norm())
    assert error < limit, f"relative error {error}"
    return error


def norm() -> float:
    import sgl_kernel

    x, w = torch.randn(64, 3584, device="cuda").bfloat16(), torch.randn(3584, device="cuda").bfloat16()
    expected = torch.nn.functional.rms_norm(x.float(), (3584,), w.float(), 1e-6)
    return _close(sgl_kernel.rmsnorm(x, w, 1e-6), expected)


def activation() -> float:
    from sglang.srt.layers.activation import silu_and_mul

    x = torch.randn(64, 2 * 8960, device="cuda").bfloat16()
    a, b = x.float().chunk(2, -1)
    return _close(silu_and_mul(x), torch.nn.functional.silu(a) * b)


def store() -> bool:
    from sglang.kernels.ops.kvcache.kvcache import store_cache

    k, v = (torch.randn(32, 512, device="cuda").bfloat16() for _ in range(2))
    caches = [torch.zeros(100, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    at = torch.randperm(100, device="cuda")[:32]
    store_cache(k, v, *caches, at)
    assert torch.equal(caches[0][at], k) and torch.equal(caches[1][at], v), "other values than were stored"
    return True


def renormalised() -> bool:
    import sgl_kernel

    p = torch.rand(4, 1000, device="cuda").softmax(-1)
    got = sgl_kernel.top_k_renorm_prob(p, torch.full((4,), 10, device="cuda", dtype=torch.int32))
    assert ((got > 0).sum(-1) == 10).all() and (got.sum(-1) - 1).abs().max() < 1e-3, "not the 10 largest"
    return True


def without_attention(backend: str) -> str | None:
    """Why an attention backend of SGLang cannot be used here; None: it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    if backend == "flashinfer":
        found = importlib.util.find_spec("flashinfer")
        return None if found else "flashinfer is not installed"
    if backend == "fa3":
        try:
            from sgl_kernel.flash_attn import is_fa3_supported
        except ImportError as error:
            return f"sgl_kernel's FA3 cannot be imported: {error}"
        return None if is_fa3_supported() else "FA3 does not support this card"
    return None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def examine() -> dict[str, Any]:
    """Each part's finding by its name, or why it has none; "seconds" of each; "failed" names those that failed."""
    result: dict[str, Any] = {"versions": versions(), "tools": {name: shutil.which(name) for name in TOOLS}}
    result["attention"] = {name: without_attention(name) or "available" for name in ("triton", "flashinfer", "fa3")}
    result.update(seconds={}, failed=[])
    for part in (nvidia_smi, card, copy, product, plugins, norm, activation, store, renormalised):
        name, start = part.__name__, time.perf_counter()
        if not torch.cuda.is_available() and part is not plugins:
            result[name] = "skipped: no GPU"
            continue
        try:
            result[name] = part()
        except Exception as error:  # reported; the next one goes on
            result[name] = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:400]}"
            result["failed"].append(name)
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        if part is product:
            torch.cuda.empty_cache()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="File for the JSON object; default: standard output.")
    args = parser.parse_args()
    result = examine()
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))
    for name in ("card", "copy", "product", "plugins", *result["failed"]):
        print(f"{name}: {result[name]}")
    return int(bool(result["failed"]))


if __name__ == "__main__":
    sys.exit(main())
