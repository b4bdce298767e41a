"""slime: rollouts from the mixture, in slime's own engines.

``--custom-generate-function-path frontend.trainers.slime_mixture.generate``, with ``SGLANG_OPTIMAL_CONFIG`` in the
environment of the engines. What the teacher reads is in each row's metadata (``--metadata-key``) under
``teacher_prompt``: text or messages; ``mixing`` beside it may hold alpha's settings. slime's rollout log-probabilities
are then log q*, those of the behaviour policy, as its truncated importance sampling (``--use-tis``) wants them.

Written against slime's interface of ``slime/rollout/sglang_rollout.py`` at 0044b40d (2026); see docs/trainers.md for
what was run.
"""

from __future__ import annotations

from typing import Any

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Draw the rest of ``sample`` from the mixture.

    Raises:
        ValueError: its metadata has no ``teacher_prompt``.
    """
    teacher = (sample.metadata or {}).get("teacher_prompt")
    if not teacher:
        raise ValueError("metadata: has no teacher_prompt; the data needs it, see --metadata-key.")
    left = sampling_params["max_new_tokens"] - sample.response_length
    if left <= 0:
        sample.status = Sample.Status.TRUNCATED
        return sample
    tokenizer = GenerateState(args).tokenizer
    if not sample.tokens:
        sample.tokens = tokenizer.encode(sample.prompt, add_special_tokens=False)
    if isinstance(teacher, str):
        teacher_ids = tokenizer.encode(teacher, add_special_tokens=False)
    else:
        teacher_ids = list(tokenizer.apply_chat_template(teacher, add_generation_prompt=True, return_dict=False))
    answered = sample.tokens[len(sample.tokens) - sample.response_length :] if sample.response_length else []
    payload = {
        "input_ids": sample.tokens,
        "sampling_params": {**sampling_params, "max_new_tokens": left},
        "return_logprob": True,
        # The router drops custom_params, and passes this on.
        "session_params": {
            "mixing": {"teacher_input_ids": teacher_ids + answered, **sample.metadata.get("mixing", {})}
        },
    }
    output = await post(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate", payload)
    meta = output["meta_info"]
    if "alpha" not in meta:
        raise ValueError("the engine did not mix: set SGLANG_OPTIMAL_CONFIG in its environment.")
    drawn = meta["output_token_logprobs"]
    sample.append_response_tokens(
        args,
        tokens=[token for _, token, *_ in drawn],
        log_probs=[logprob for logprob, *_ in drawn],
        trainable=True,
        meta_info=meta,
        text=output["text"],
    )
    return sample
