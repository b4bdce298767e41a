"""SGLang's GPU mechanisms on a CPU, in a scheduler process: what a test of the real engine cannot see otherwise.

Imitated, with SGLang's own code wherever it runs without a GPU:

- ``DecodeCudaGraphRunner``: captured batch sizes and padding, static input buffers, the process-wide pool of them, and
  the one buffer of logits that all models of a process with the same vocabulary size share. Only the recording is ours:
  a graph here is the call, made again at replay, whose results are copied to where the first ones lay.
- The logits of a prefill graph, which SGLang writes into that same buffer; the prefill itself is eager here.
- Attention: SGLang's triton backend in Triton's interpreter, with ``attention="triton"``; else the CPU's own.
- Poison: before a replay everything that graphs gave out (logits, hidden states) becomes NaN, and after one every
  static input is overwritten, so that whoever kept a view of a static buffer is seen. Memory from ``torch.empty`` is
  NaN (or the largest integer).
- The memory saver, see `memory_saver`.
- Host waits are counted, see `host_waits`. Beside the triton backend, FlashInfer's KV indices are built as well.

Not imitated: streams, kernels, the memory of graphs, FlashInfer's and flash attention, prefill graphs' bodies.
"""

from __future__ import annotations

import contextlib
import functools
import os
import types
from collections.abc import Iterator
from typing import Any

ATTENTION = "GPU_LIKE_ATTENTION"


def gpu_like_scheduler_process(config):
    """In place of `MixedEngine.scheduler_process`."""
    return functools.partial(_run, config)


def _run(config, *args, **kwargs) -> None:
    imitate()
    from gpu_like import faults, flashinfer_indices, host_waits, memory_saver

    faults.install()
    memory_saver.install()
    host_waits.install()
    if os.environ.get(ATTENTION) == "triton":
        flashinfer_indices.install()
    from sglang_optimal.runtime.managers.scheduler import run_mixed_scheduler_process

    run_mixed_scheduler_process(config, *args, **kwargs)


def imitate() -> None:
    """Change this process; once, before SGLang builds its scheduler."""
    import torch
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as decode
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
    from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

    from sglang_optimal.platforms.cpu_attention import GroupedRowsTorchNativeAttnBackend
    from sglang_optimal.platforms.torch_cpu import TorchCpuSRTPlatform

    triton = os.environ.get(ATTENTION) == "triton"
    TorchCpuSRTPlatform.capabilities = PlatformCapabilities(graph_capture=True, supports_triton=triton)
    TorchCpuSRTPlatform.get_kv_pool_cls = SRTPlatform.get_kv_pool_cls  # whose memory torch takes
    TorchCpuSRTPlatform.get_graph_runner_cls = lambda self: DecodeCudaGraphRunner
    TorchCpuSRTPlatform.get_full_graph_backend_cls = lambda self: RecordedGraphs
    # SGLang captures on a CPU only where it compiles; nothing else there asks for this flag.
    cuda_graph_setup.get_flags = lambda: types.SimpleNamespace(capture=types.SimpleNamespace(enable_torch_compile=True))
    decode.graph_capture = _no_stream
    decode.get_or_create_global_graph_capture_stream = lambda: None
    torch.cpu.is_current_stream_capturing = lambda: False
    GroupedRowsTorchNativeAttnBackend.init_cuda_graph_state = lambda self, max_bs, max_num_tokens: None
    GroupedRowsTorchNativeAttnBackend.get_cuda_graph_seq_len_fill_value = lambda self: 1
    GroupedRowsTorchNativeAttnBackend.init_forward_metadata_out_graph = lambda self, batch, in_capture=False: (
        self.init_forward_metadata(batch)
    )
    _prefill_logits_in_the_shared_buffer()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@contextlib.contextmanager
def _no_stream(stream=None) -> Iterator[types.SimpleNamespace]:
    yield types.SimpleNamespace(stream=stream)


def _prefill_logits_in_the_shared_buffer() -> None:
    """As the eager tail of a prefill graph does (``PrefillCudaGraphRunner._next_token_logits_buffer``)."""
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner

    load, forward = EagerRunner.load_batch, ModelRunner._forward_raw
    runners_of_graphs: set[int] = set()

    def load_batch(self, forward_batch, *args, **kwargs):
        batch = load(self, forward_batch, *args, **kwargs)
        shared = self.model_runner.graph_shared_output
        rows = batch.batch_size
        if batch.forward_mode.is_extend() and not batch.return_logprob and shared and rows <= shared.max_rows:
            poison_outputs()
            vocab_size = self.model_runner.model_config.vocab_size
            batch.next_token_logits_buffer = shared.get_logits_buffer(vocab_size, rows=rows)
            runners_of_graphs.add(id(self.model_runner))
        return batch

    def forward_raw(self, *args, **kwargs):
        runners_of_graphs.discard(id(self))
        output = forward(self, *args, **kwargs)
        output.can_run_graph |= id(self) in runners_of_graphs
        return output

    EagerRunner.load_batch, ModelRunner._forward_raw = load_batch, forward_raw


class RecordedGraphs:
    """SGLang's ``BaseCudaGraphBackend`` whose graphs are calls."""

    replays = 0
    padded_replays = 0

    def __init__(self, runner, *, enable_memory_saver: bool = False):
        self._runner = runner
        self._calls: dict[Any, Any] = {}
        self._outputs: dict[Any, Any] = {}

    @contextlib.contextmanager
    def capture_session(self, stream) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def capture_one(self, shape_key, forward_fn, capture_inputs=None, post_warmup_hook=None) -> None:
        forward_fn()
        if post_warmup_hook is not None:
            post_warmup_hook()
        # A captured kernel goes on reading the metadata that lay there at its capture.
        metadata = self._runner.attn_backend.forward_metadata
        self._calls[shape_key] = functools.partial(self._with_metadata, metadata, forward_fn)
        self._outputs[shape_key] = forward_fn()
        _given_out.append(self._outputs[shape_key])

    def _with_metadata(self, metadata, forward_fn):
        backend = self._runner.attn_backend
        before, backend.forward_metadata = backend.forward_metadata, metadata
        try:
            return forward_fn()
        finally:
            backend.forward_metadata = before

    def can_run(self, forward_batch, shape_key) -> bool:
        return shape_key in self._calls

    def replay(self, shape_key, static_forward_batch, **kwargs):
        poison_outputs()
        fresh = self._calls[shape_key]()
        output = self._outputs[shape_key]
        for place, value in zip(_tensors(output), _tensors(fresh), strict=True):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
        RecordedGraphs.replays += 1
        RecordedGraphs.padded_replays += shape_key.size != static_forward_batch.batch_size
        self._poison_inputs()
        return output

    def cleanup(self) -> None:
        self._calls.clear()
        self._outputs.clear()

    def _poison_inputs(self) -> None:
        """Other values that are as legal: padded rows are read too."""
        buffers = self._runner.buffers
        last = self._runner.model_runner.model_config.vocab_size - 1
        for name, value in (("input_ids", last), ("req_pool_indices", 0), ("out_cache_loc", 0), ("positions", 0)):
            getattr(buffers, name).fill_(value)
        for name in ("seq_lens", "seq_lens_cpu"):
            getattr(buffers, name).fill_(self._runner.seq_len_fill_value)


_given_out: list[Any] = []
"""What graphs gave out when they were captured; SGLang hands out views of it after each replay."""


def poison_outputs() -> None:
    """Overwrite the logits of every model of the process, and all else that graphs gave out."""
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput

    shared = GraphSharedOutput._process_shared
    for buffer in () if shared is None else shared._logits_buffers.values():
        buffer.fill_(float("nan"))
    for output in _given_out:
        for tensor in _tensors(output):
            tensor.fill_(float("nan"))


def _tensors(output) -> list:
    return [value for value in vars(output).values() if hasattr(value, "data_ptr")]
