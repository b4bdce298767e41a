"""The sampling backend ``optimal``: SGLang's own sampler, run on the mixture's logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from sglang.srt.layers.sampler import Sampler
from sglang.srt.runtime_context import get_context, get_exec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_optimal.mixing import compile_kernels

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
        if sampling_info.grammars:
            _unmask_dead_rows(logits_output.next_token_logits)
        return super().forward(logits_output, sampling_info, *args, **kwargs)


def _unmask_dead_rows(logits: torch.Tensor) -> None:
    """Let rows [B, V] without any allowed token be sampled, in place.

    A grammar that is at its end and ``min_new_tokens`` mask every token together, and sampling that row would end the
    whole process. The grammar refuses whatever is drawn, which ends the request alone.
    """
    logits.masked_fill_((logits.amax(-1) == -torch.inf).unsqueeze(-1), 0.0)


def create_mixture_sampler() -> MixtureSampler:
    """Factory of ``--sampling-backend optimal``; called by each model runner.

    Raises:
        RuntimeError: SGLang's own scheduler asked for it, which has no student and would sample the teacher alone.
    """
    if not _has_student.get():
        raise RuntimeError(
            "--sampling-backend optimal needs a student: start the server with python -m sglang_optimal.launch_server."
        )
    if get_exec().kernel.sampling_backend == BACKEND:
        # SGLang's sampler picks its top-k/top-p kernels by this name; the record of launch arguments keeps "optimal".
        get_context().override("sglang_optimal.sampler", sampling_backend=_kernel_backend())
    return MixtureSampler()


def install(model_runner) -> None:
    """Make a model runner sample mixtures. SGLang replaces the backend's name on CPU and in deterministic mode."""
    if not isinstance(model_runner.sampler, MixtureSampler):
        model_runner.sampler = create_mixture_sampler()
    compile_kernels(model_runner.device, model_runner.model_config.vocab_size)


_has_student: ContextVar[bool] = ContextVar("sglang_optimal.has_student", default=False)


@contextlib.contextmanager
def beside_a_student() -> Iterator[None]:
    """Build the model runners of a worker with a student within; no other may have a `MixtureSampler`."""
    token = _has_student.set(True)
    try:
        yield
    finally:
        _has_student.reset(token)


def _kernel_backend() -> str:
    if not torch.cuda.is_available() or get_exec().deterministic.enable_deterministic_inference:
        return "pytorch"
    from sglang.srt.utils.common import is_flashinfer_available

    return "flashinfer" if is_flashinfer_available() else "pytorch"
