"""Sleep and wake on a GPU: how much memory comes back, how long it takes, and that the text is the same afterwards.

    python -m bench.gpu.check_sleep --model-path TEACHER --student-model-path STUDENT --server-args --load-format dummy

The weights are backed up in the host's memory, since nobody sends them again. Greedy text of mixed and plain requests
must be the same after each kind of memory was released and taken again, and after all were; releasing all must give
back most of what the engine took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.common import add_server_arguments, server_arguments
from sglang_optimal import OptimalSampler

TAGS = ("kv_cache", "weights", "cuda_graph")
LEAST = 0.7
"""Of what the engine took, that releasing all must give back; CUDA's context and workspaces stay."""
PROMPTS = ("12+30=", "The capital of France is", "a b c d")


def texts(sampler: OptimalSampler) -> list[list[int]]:
    """Greedy tokens of mixed requests, and of plain ones in the same batch."""
    fields = {"student_text": "a", "kl_budget": 0.5}
    params: list[dict[str, Any]] = [
        {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True, **more}
        for more in ({"custom_params": fields}, {})
        for _ in PROMPTS
    ]
    outputs = sampler.engine.generate(prompt=[*PROMPTS, *PROMPTS], sampling_params=params)
    return [output["output_ids"] for output in outputs]


def measure(sampler: OptimalSampler, free: Callable[[], float]) -> dict[str, Any]:
    """What releasing gives, by kind and altogether, in the unit of ``free``.

    Args:
        free: the device's free memory.

    Returns:
        {kind or "all": {"released", "sleep_s", "wake_s", "same_text"}}
    """
    before = texts(sampler)
    found = {}
    for name, tags in (*((tag, [tag]) for tag in TAGS), ("all", None)):
        had = free()
        start = time.perf_counter()
        sampler.engine.release_memory_occupation(tags)
        asleep = time.perf_counter()
        released = free() - had
        waking = time.perf_counter()
        sampler.engine.resume_memory_occupation(tags)
        awake = time.perf_counter()
        found[name] = {
            "released": released,
            "sleep_s": round(asleep - start, 2),
            "wake_s": round(awake - waking, 2),
            "same_text": texts(sampler) == before,
        }
    return found


def passes(found: dict[str, Any], taken: float) -> bool:
    """Whether the text is the same, and most of what was ``taken`` came back."""
    return all(one["same_text"] for one in found.values()) and found["all"]["released"] >= LEAST * taken


def free_gb() -> float:
    import torch

    return torch.cuda.mem_get_info()[0] / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="The teacher.")
    parser.add_argument("--student-model-path", required=True)
    add_server_arguments(parser, "SGLang")
    args = parser.parse_args()
    own = {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    had = free_gb()
    with OptimalSampler(args.model_path, args.student_model_path, **server_arguments(args.server_args, own)) as sampler:
        taken = had - free_gb()
        found = measure(sampler, free_gb)
    print(json.dumps({"taken_gb": round(taken, 1), **found}))
    return 0 if passes(found, taken) else 1


if __name__ == "__main__":
    sys.exit(main())
