"""The sampling backend ``optimal``: SGLang's own sampler, run on the mixture's logits."""

from __future__ import annotations

import torch
from sglang.srt.layers.sampler import Sampler
from sglang.srt.runtime_context import get_context, get_exec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

BACKEND = "optimal"


class MixtureSampler(Sampler):
    """Replaces the mixed rows' logits by ``T·log q*`` (up to a constant), then samples as SGLang does.

    Temperature, top-k, top-p, min-p, seeds and returned logprobs therefore mean on the mixture what they mean in SGLang
    on one model. Batches without mixed rows go straight through.
    """

    def forward(self, logits_output, sampling_info: SamplingBatchInfo, *args, **kwargs) -> torch.Tensor:
        step = getattr(sampling_info, "mixing", None)
        if step is not None:
            logits_output.next_token_logits = step.mix_into(logits_output.next_token_logits, sampling_info)
        return super().forward(logits_output, sampling_info, *args, **kwargs)


def create_mixture_sampler() -> MixtureSampler:
    """Factory of ``--sampling-backend optimal``; called by each model runner."""
    if get_exec().kernel.sampling_backend == BACKEND:
        # SGLang's sampler picks its top-k/top-p kernels by this name; the record of launch arguments keeps "optimal".
        get_context().override("sglang_optimal.sampler", sampling_backend=_kernel_backend())
    return MixtureSampler()


def _kernel_backend() -> str:
    if not torch.cuda.is_available() or get_exec().deterministic.enable_deterministic_inference:
        return "pytorch"
    from sglang.srt.utils.common import is_flashinfer_available

    return "flashinfer" if is_flashinfer_available() else "pytorch"
