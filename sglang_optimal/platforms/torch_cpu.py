"""SGLang on plain PyTorch CPU kernels: the real scheduler, radix cache and overlap loop, without native kernels."""

from __future__ import annotations

import functools

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_optimal.platforms import cpu_dtype


class TorchCpuSRTPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU as an out-of-tree platform.

    SGLang's in-tree CPU engine needs compiled kernels that its PyPI wheel does not carry; an out-of-tree platform takes
    the generic paths instead (torch-native attention, ``forward_native`` layers).
    """

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args) -> None:
        """Compute in float32 where the processor does so faster, see `cpu_dtype`."""
        if server_args.dtype == "auto":
            model = server_args.model_path, server_args.revision
            server_args.dtype = cpu_dtype.chosen(*model, server_args.quantization)

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def support_mamba_cache_extra_buffer(self) -> bool:
        """Yes: `cpu_recurrent` keeps the states that a radix cache asks for."""
        return True

    def get_kv_pool_cls(self, *, kind) -> type | None:
        """One whose memory is taken when it is used."""
        from sglang_optimal.platforms.cpu_memory_pool import LazyMHATokenToKVPool

        return LazyMHATokenToKVPool if kind == "mha" else super().get_kv_pool_cls(kind=kind)

    def is_pin_memory_available(self, device=None) -> bool:
        """Never: there is no device to pin memory for."""
        return False

    def init_backend(self) -> None:
        """Attention, layers and sampling of our own, where plain PyTorch is slow."""
        from sglang.srt.layers import sampler
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.mem_cache import allocation

        from sglang_optimal.platforms import cpu_layers, packed_linear
        from sglang_optimal.platforms.cpu_attention import GroupedRowsTorchNativeAttnBackend
        from sglang_optimal.platforms.cpu_sampling import drawing_one_number

        register_attention_backend("torch_native")(GroupedRowsTorchNativeAttnBackend)
        allocation.assign_req_to_token_pool_func = write_slots
        sampler.sampling_from_probs_torch = drawing_one_number(sampler.sampling_from_probs_torch)
        cpu_layers.register(self.get_dispatch_key_name())
        packed_linear.watch_updates()

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Pack the weights of linear layers, and let experts and recurrent layers do without Triton."""
        from sglang_optimal.platforms import cpu_experts, cpu_recurrent, packed_linear

        packed_linear.pack(model)
        cpu_experts.install(model)
        if cpu_recurrent.is_recurrent(model):
            cpu_recurrent.install()
            ignore_pinned_memory()  # the scheduler pins which states are to be kept

    def get_device(self, device_id: int = 0) -> str:
        """The name alone, without an index."""
        # SGLang's argument resolution wants the name (it splits off an index).
        return "cpu"

    def get_torch_profiler_activity_str(self) -> str:
        """PyTorch's name of it; without one a request for a profile ends the server."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """The CPU's alone."""
        return torch.profiler.ProfilerActivity.CPU


@functools.cache  # else each model that asks for it wraps torch.tensor once more
def ignore_pinned_memory() -> None:
    """Let code that pins host memory run where there is no accelerator to pin it for, and PyTorch therefore refuses.

    SGLang's LoRA layers pin without asking, and its scheduler beside recurrent layers. For a process without an
    accelerator only; it then applies to all of it.
    """

    def unpinned(create):
        @functools.wraps(create)
        def wrapper(*args, pin_memory: bool = False, **kwargs):
            return create(*args, **kwargs)

        return wrapper

    torch.tensor, torch.zeros = unpinned(torch.tensor), unpinned(torch.zeros)
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore


def write_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """In place of SGLang's Triton kernel ``assign_req_to_token_pool``: new slots into their rows, for speculation.

    Args:
        req_pool_indices: [B] rows of the table ``req_to_token`` [rows, max context].
        start_offset, end_offset: [B] the positions [start, end) of each row that are new.
        out_cache_loc: the slots, row after row.
    """
    lengths = (end_offset - start_offset).long()
    before = lengths.cumsum(0) - lengths
    positions = torch.arange(len(out_cache_loc)) + (start_offset - before).repeat_interleave(lengths)
    req_to_token[req_pool_indices.repeat_interleave(lengths), positions] = out_cache_loc.to(req_to_token.dtype)
