"""Which tokens of a speculative step may be drawn at all: those that SGLang's sampler would leave in lockstep."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers import sampler
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_optimal.mixing.filters import Kernels, SamplingFilters
from sglang_optimal.runtime.core import MixedRows


def filters_of(info: SamplingBatchInfo, rows: MixedRows) -> SamplingFilters:
    """The settings of some rows of a batch, to be applied as lockstep applies them to that batch."""
    return SamplingFilters(
        temperature=rows.select(info.temperatures).view(-1),
        top_k=rows.select(info.top_ks),
        top_p=rows.select(info.top_ps),
        min_p=rows.select(info.min_ps),
        needed=info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling,
        greedy=info.is_all_greedy,
        some_greedy=info.is_any_greedy,
        largest_top_k=info.max_top_k,
        kernels=kernels_for(info),
    )


def kernels_for(info: Any) -> Kernels | None:
    """What SGLang samples with, by the limits that ``info`` has: flashinfer's kernels, whose order is another where any
    row of the batch has a min-p, or PyTorch's sort."""
    if get_exec().kernel.sampling_backend != "flashinfer":
        return None
    return Kernels(
        top_k=sampler.top_k_renorm_prob if info.need_top_k_sampling else None,
        top_p=sampler.top_p_renorm_prob if info.need_top_p_sampling else None,
        joint=not info.need_min_p_sampling,
    )
