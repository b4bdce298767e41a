"""The guest: a second, complete model worker in the scheduler process, and the batches it runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from sglang.srt.eplb.expert_distribution import (
    get_global_expert_distribution_recorder,
    set_global_expert_distribution_recorder,
)
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata, set_global_expert_location_metadata
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunnerOutput

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.configs.model_config import guest_model_config
from sglang_optimal.runtime.core import DecodePlan, PrefillPlan
from sglang_optimal.runtime.managers.schedule_batch import decode_part, prefill_micro_batches


class GuestTpModelWorker(TpModelWorker):
    """Loads the guest beside the host, with pools, attention backend and CUDA graphs of its own."""

    def __init__(self, config: MixingConfig, **worker_kwargs):
        self._mixing = config
        with _own_expert_layout():
            super().__init__(**worker_kwargs)

    def _init_model_config(self) -> None:
        """The guest's, where SGLang's is the scheduler's model."""
        mixing = self._mixing
        self.model_config = guest_model_config(self.server_args, mixing.guest_path, mixing.guest_revision)

    def forward_decode(
        self, batch: ScheduleBatch, plan: DecodePlan, input_ids: torch.Tensor | None = None, *, view: bool = False
    ) -> torch.Tensor:
        """Run the mixed rows of a decode batch. Returns logits [n, V_guest].

        Args:
            input_ids: [n] what they read; None: what the batch does.
            view: whether the caller copies them before any model's next forward, which may overwrite them then.
        """
        part = decode_part(batch, plan, input_ids=input_ids)
        return self._forward(part).logits_output.next_token_logits if view else self._output(part).next_token_logits

    def forward_prefill(self, batch: ScheduleBatch, plan: PrefillPlan) -> torch.Tensor:
        """Prefill the guest contexts, at most the chunk size in one forward.

        Returns:
            logits [n, V_guest] of each context's last token, in the order of ``plan.rows``.
        """
        return prefill_micro_batches(batch, plan, self._output)

    def _output(self, part: ScheduleBatch) -> LogitsProcessorOutput:
        return kept(self._forward(part))

    def _forward(self, part: ScheduleBatch) -> ModelRunnerOutput:
        forward_batch = ForwardBatch.init_new(part, self.model_runner, return_hidden_states_before_norm=False)
        return self.model_runner.forward(forward_batch)


def kept(output: ModelRunnerOutput) -> LogitsProcessorOutput:
    """What a forward gave, safe from the next forward of any model in this process.

    A graph's output is a view of static buffers. The one of the logits is shared by all models of the process that have
    the same vocabulary size (``GraphSharedOutput``), and the memory of graphs by all graphs.
    """
    logits_output = output.logits_output
    if not output.can_run_graph:
        return logits_output
    tensors = {name: value for name, value in vars(logits_output).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(logits_output, **{name: value.clone() for name, value in tensors.items()})


@contextlib.contextmanager
def _own_expert_layout() -> Iterator[None]:
    """SGLang keeps one layout of the experts a process, which a model is loaded by; afterwards the host's is back.

    What reads it in a forward (expert load balancing and its dispatch) is refused beside a guest.
    """
    layout, recorder = get_global_expert_location_metadata(), get_global_expert_distribution_recorder()
    set_global_expert_location_metadata(None, allow_overwrite=True)
    try:
        yield
    finally:
        set_global_expert_location_metadata(layout, allow_overwrite=True)
        set_global_expert_distribution_recorder(recorder)
