"""What decode graphs and their attention plans need where two models, or more rows than requests, share a process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from sglang.srt.model_executor.cuda_graph_buffer_registry import PaddingPolicy

# Their decode plans are copied to the device from one pinned buffer for each batch size.
_PINNED_PLANS = ("FlashInferAttnBackend", "FlashInferMLAAttnBackend")


@contextlib.contextmanager
def resized_buffers(runner, rows: int) -> Iterator[None]:
    """SGLang sizes static buffers and graphs by the number of requests; within, for up to ``rows`` rows of each.

    Args:
        runner: the model runner, whose buffers are made within.
    """
    pool = runner.req_to_token_pool
    requests, size = runner.max_running_requests, pool.size
    runner.max_running_requests, pool.size = rows * requests, rows * size
    try:
        yield
    finally:
        runner.max_running_requests, pool.size = requests, size


def prepare_graphs(runner, rows: int) -> None:
    """After a model runner's graphs are captured: make them safe beside another model's, now and when captured anew.

    Args:
        runner: the model runner. rows: of a decode batch for each request, at most.
    """
    _pad_with_known_ids(runner)
    capture = runner.init_decode_cuda_graph

    def with_room() -> None:
        with resized_buffers(runner, rows):
            capture()
        _pad_with_known_ids(runner)

    # What SGLang calls where weights have changed and the graphs are to be captured anew.
    runner.init_decode_cuda_graph = with_room


def _pad_with_known_ids(runner) -> None:
    """Padded rows are embedded too, and both models' graphs read one buffer of ids: what the host left there may be
    an id that the guest's embedding does not have."""
    registry = getattr(runner.decode_cuda_graph_runner, "buffer_registry", None)
    if registry is not None:
        registry.get_slot("input_ids").padding_policy = PaddingPolicy.ZERO


def fence_plans(backend, event: Callable[[], torch.cuda.Event] | None = None) -> None:
    """Let a plan of FlashInfer's be copied to the device before the next one overwrites it on the CPU.

    SGLang alone needs no fence: there the copy is the first thing that the device does after the step before, whose
    result the CPU has just processed. With a guest the copy of the host's plan waits behind the guest's forward, and of
    one draft's behind the draft before. The CPU then waits until the forward before has begun, not until it has ended,
    so the device always has work.

    Args:
        backend: an attention backend; others than FlashInfer's plan on the device and are left alone.
        event: makes an event of the current stream; by default CUDA's.
    """
    for part in (backend, getattr(backend, "prefill_backend", None), getattr(backend, "decode_backend", None)):
        if any(cls.__name__ in _PINNED_PLANS for cls in type(part).__mro__):
            _fence(part, event or torch.cuda.Event)


def _fence(backend, new_event: Callable[[], torch.cuda.Event]) -> None:
    plan = backend.init_forward_metadata_out_graph
    copied: torch.cuda.Event | None = None

    def fenced(forward_batch, in_capture: bool = False) -> None:
        nonlocal copied
        if copied is not None:
            copied.synchronize()
        plan(forward_batch, in_capture=in_capture)
        if not in_capture:
            copied = new_event()
            copied.record()

    backend.init_forward_metadata_out_graph = fenced
