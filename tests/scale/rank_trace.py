"""A scheduler process that writes down every token id its rank samples."""

from __future__ import annotations

import functools
import json
import os

TRACE = "RANK_TRACE_FOLDER"


def traced_scheduler_process(config):
    """In place of `MixedEngine.scheduler_process`."""
    return functools.partial(_run, config)


def _run(config, *args, **kwargs) -> None:
    from sglang.srt.runtime_context import get_parallel

    from sglang_optimal.runtime.managers.scheduler import run_mixed_scheduler_process
    from sglang_optimal.runtime.sampling.sampler import MixtureSampler
    from sglang_optimal.runtime.speculative.spec_worker import MixingSpecWorker

    sample, speculate = MixtureSampler.forward, MixingSpecWorker._speculate

    def write(*line) -> None:
        with open(os.path.join(os.environ[TRACE], f"{get_parallel().tp_rank}.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")

    def forward(self, logits_output, sampling_info, *more, **keywords):
        tokens = sample(self, logits_output, sampling_info, *more, **keywords)
        step = getattr(sampling_info, "mixing", None)
        write(tokens.tolist(), step is not None and step.rows.row_ids)
        return tokens

    def several(self, *more, **keywords):
        result = speculate(self, *more, **keywords)
        write(result.next_token_ids.tolist(), result.accept_lens.tolist())
        return result

    MixtureSampler.forward, MixingSpecWorker._speculate = forward, several
    run_mixed_scheduler_process(config, *args, **kwargs)
