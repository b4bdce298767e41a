"""A scheduler process that writes down every token id its rank samples."""

from __future__ import annotations

import functools
import json
import os

TRACE = "RANK_TRACE_FOLDER"


def traced_scheduler_process(config):
    """In place of `sglang_optimal.runtime.scheduler.scheduler_process`."""
    return functools.partial(_run, config)


def _run(config, *args, **kwargs) -> None:
    from sglang.srt.runtime_context import get_parallel

    from sglang_optimal.runtime.sampler import MixtureSampler
    from sglang_optimal.runtime.scheduler import run_mixed_scheduler_process

    sample = MixtureSampler.forward

    def forward(self, logits_output, sampling_info, *more, **keywords):
        tokens = sample(self, logits_output, sampling_info, *more, **keywords)
        step = getattr(sampling_info, "mixing", None)
        rank = get_parallel().tp_rank
        with open(os.path.join(os.environ[TRACE], f"{rank}.jsonl"), "a") as file:
            file.write(json.dumps([tokens.tolist(), step is not None and step.rows.host]) + "\n")
        return tokens

    MixtureSampler.forward = forward
    run_mixed_scheduler_process(config, *args, **kwargs)
