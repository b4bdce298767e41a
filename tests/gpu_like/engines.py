"""Engines that run as on a GPU, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from harness import start
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from gpu_like import faults, imitation
from gpu_like.memory_saver import ImitatedMemorySaver
from sglang_optimal import OptimalSampler
from sglang_optimal.runtime import launch
from sglang_optimal.runtime.entrypoints.engine import MixedEngine

GRAPHS: dict[str, Any] = {"cuda_graph_bs_decode": [1, 2, 4, 8, 16]}
"""Few sizes, so that many batches are padded, and the largest ones run without a graph."""
TRITON: dict[str, Any] = {"attention_backend": "triton", "triton_attention_num_kv_splits": 2}


@contextlib.contextmanager
def gpu_like(fault: str = "", *, triton: bool = False) -> Iterator[None]:
    """Engines that are started within imitate a GPU, and have the fault that `faults.FILE` names at each moment."""
    faults.file().write_text(fault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixedEngine, "scheduler_process", staticmethod(imitation.gpu_like_scheduler_process))
        patch.setattr(launch, "can_release", lambda device: True)
        patch.setattr(TorchMemorySaverAdapter, "create", staticmethod(lambda enable: ImitatedMemorySaver()))
        if triton:
            patch.setenv(imitation.ATTENTION, "triton")
            patch.setenv("TRITON_INTERPRET", "1")  # decided where Triton is imported: in the engine's processes
        yield


@contextlib.contextmanager
def start_gpu_like(pair, *, triton: bool = False, **arguments: Any) -> Iterator[OptimalSampler]:
    """An engine over a tiny pair that imitates a GPU; faults can be put back within."""
    more = {**GRAPHS, **(TRITON if triton else {}), **arguments}
    with gpu_like(triton=triton), start(pair, **more) as engine:
        yield engine


def gpu_state(engine: OptimalSampler) -> dict[str, Any]:
    """What the imitation has counted: decode_steps, replays, padded_replays, host_waits {where: how often}."""
    return engine.engine.get_server_info()["internal_states"][0]["gpu_like"]


def self_check(engine: OptimalSampler) -> str:
    """What the self-check of a running, idle engine finds; "" for nothing."""
    with faults.self_check_asked():
        return gpu_state(engine)["self_check"]
