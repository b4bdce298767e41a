"""Checks of any request, plain ones too, before it leaves the tokenizer manager.

SGLang 0.5.23 takes what is refused here, and then its scheduler ends over it, and with it every other request. A field
that is only of the wrong type gives HTTP 500 there, and a 400 here.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

MAX_SAMPLES = 16384
"""Most samples, ``n`` times the prompts, of one request: SGLang makes an object for each before anything else."""
_INT64 = 2**63
_INT32 = 2**31
_FLOAT32 = 3.4e38
_INTEGERS = ("max_new_tokens", "min_new_tokens", "top_k", "n", "beam_width", "stream_interval")
_NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
SMALLEST_REPETITION_PENALTY = 1e-6
"""Logits are divided by it; below it they may become infinite."""

_PER_PROMPT = (
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "custom_logit_processor",
    "lora_path",
    "video_data",
    "audio_data",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
)


def check_batch(obj: GenerateReqInput) -> None:
    """Check what belongs to all prompts of a request, before SGLang splits it.

    Raises:
        ValueError: names the field and the fix.
    """
    if obj.text is None and obj.input_ids is None and obj.input_embeds is None:
        return  # SGLang refuses it
    size = _batch_size(obj)
    if size == 0:
        raise ValueError("text: is an empty list; send at least one prompt.")
    for name in (*_PER_PROMPT, "rid", "token_ids_logprob"):
        value = getattr(obj, name, None)
        if not isinstance(value, list):
            continue
        if name == "token_ids_logprob" and not any(isinstance(ids, list) for ids in value):
            continue  # one list of ids, for every prompt
        if size is None:
            raise ValueError(f"{name}: is a list for one prompt; give it without the list, or a list of prompts.")
        if len(value) != size:
            raise ValueError(f"{name}: has {len(value)} entries for {size} prompts; give one for each.")
    rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
    if any(rid is not None and not isinstance(rid, str) for rid in rids):
        raise ValueError(f"rid: must be text, got {obj.rid!r}.")
    _check_samples(obj, size or 1)


def _batch_size(obj: GenerateReqInput) -> int | None:
    """None for one prompt that is not in a list."""
    for value in (obj.text, obj.input_ids, obj.input_embeds):
        if value is None or isinstance(value, str):
            continue
        inner = value[0] if value else None
        if value is obj.input_embeds:  # a list of vectors is one prompt
            inner = inner[0] if inner else None
        return len(value) if value is obj.text or isinstance(inner, list) else None
    return None


def _check_samples(obj: GenerateReqInput, prompts: int) -> None:
    obj.sampling_params = _without_null_n(obj.sampling_params)
    params = obj.sampling_params if isinstance(obj.sampling_params, list) else [obj.sampling_params]
    for i, each in enumerate(params):
        where = f"sampling_params[{i}]" if isinstance(obj.sampling_params, list) else "sampling_params"
        if each is not None and not isinstance(each, dict):
            raise ValueError(f"{where}: must be a mapping, got {type(each).__name__}.")
        n = (each or {}).get("n", 1)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n: must be an integer of at least 1, got {n!r}.")
        if n * prompts > MAX_SAMPLES:
            raise ValueError(f"n: {n} samples of {prompts} prompts are more than {MAX_SAMPLES} in one request.")


def _without_null_n(params: Any) -> Any:
    """SGLang compares the ``n`` of a batch with numbers, and takes none for one prompt as absent."""
    if isinstance(params, list):
        return [_without_null_n(each) for each in params]
    if isinstance(params, dict) and params.get("n", 1) is None:
        return {name: value for name, value in params.items() if name != "n"}
    return params


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Read a request's fields within: what Python says of values of a wrong type is the client's error.

    Raises:
        ValueError: in place of it.
    """
    try:
        yield
    except ValueError:
        raise
    except (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, re.error) as error:
        raise ValueError(f"sampling_params: a value is of the wrong type or form: {error}") from error


def check_ids(input_ids: list[int] | None, vocab_size: int) -> None:
    """Refuse token ids that no row of the embedding belongs to.

    Raises:
        ValueError: names the first one.
    """
    if input_ids is None or len(input_ids) == 0:
        return
    if min(input_ids) >= 0 and max(input_ids) < vocab_size:
        return
    position, token = next((i, t) for i, t in enumerate(input_ids) if not 0 <= t < vocab_size)
    raise ValueError(f"input_ids[{position}]: {token} is outside the vocabulary [0, {vocab_size}).")


def check_request(obj: GenerateReqInput | EmbeddingReqInput, vocab_size: int) -> None:
    """Check the numbers of one prompt's request that SGLang hands on without a look.

    Raises:
        ValueError: names the field and the fix.
    """
    if not isinstance(obj, GenerateReqInput):
        return
    start = _integer(obj.logprob_start_len, "logprob_start_len")
    if start is not None and start < -1:
        raise ValueError(f"logprob_start_len: must be -1 (the output alone) or a position, got {start}.")
    top = _integer(obj.top_logprobs_num, "top_logprobs_num")
    if top is not None and not 0 <= top <= vocab_size:
        raise ValueError(f"top_logprobs_num: must lie in [0, {vocab_size}], got {top}.")
    for name in ("priority", "bootstrap_room", "max_thinking_tokens", "routed_experts_start_len"):
        value = getattr(obj, name, None)
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            raise ValueError(f"{name}: {value} is too large.")
    check_stop_regex((obj.sampling_params or {}).get("stop_regex"))


def check_stop_regex(patterns: Any) -> None:
    """Refuse a ``stop_regex`` that Python cannot compile, which SGLang does in its scheduler.

    Raises:
        ValueError: names it.
    """
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        if pattern is None:
            continue
        if not isinstance(pattern, str):
            raise ValueError(f"stop_regex: must be text, got {pattern!r}.")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"stop_regex: {pattern!r} is no regular expression: {error}.") from None


def check_sampling(params: Any, vocab_size: int) -> None:
    """Check SGLang's own SamplingParams, made of the request's and of the server's defaults.

    Raises:
        ValueError: names the field and the fix.
    """
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            raise ValueError(f"{name}: {value} is too large.")
    for name in _INTEGERS:
        value = _integer(getattr(params, name), name)
        if value is not None and not -_INT32 <= value < _INT32:
            raise ValueError(f"{name}: {value} is too large.")
    for name in _NUMBERS:
        value = getattr(params, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: must be a number, got {value!r}.")
        if not abs(value) <= _FLOAT32:
            raise ValueError(f"{name}: must be finite in float32, got {value}.")
    if params.repetition_penalty < SMALLEST_REPETITION_PENALTY:
        raise ValueError(
            f"repetition_penalty: must be at least {SMALLEST_REPETITION_PENALTY}, got {params.repetition_penalty}."
        )
    # A step would be divided by it, or wait for ever.
    if params.stream_interval is not None and params.stream_interval < 1:
        raise ValueError(f"stream_interval: must be at least 1, got {params.stream_interval}.")
    for token, bias in (params.logit_bias or {}).items():
        if not math.isfinite(bias) or abs(bias) > _FLOAT32:
            raise ValueError(f"logit_bias: that of {token} must be a finite number, got {bias}.")
    stops = params.stop_token_ids or ()
    if params.min_new_tokens > 0:  # SGLang forbids them until then, by their place in the logits
        for token in stops:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"stop_token_ids: {token} is outside the vocabulary [0, {vocab_size}), which min_new_tokens "
                    "cannot forbid; remove it."
                )
    for token in stops:
        if not -_INT64 <= token < _INT64:
            raise ValueError(f"stop_token_ids: {token} is too large.")
    for stop in (*params.stop_strs, *params.stop_regex_strs):
        if not isinstance(stop, str):
            raise ValueError(f"stop: must be text, got {stop!r}.")


def _integer(value: Any, name: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{name}: must be an integer, got {value!r}.")
    return value
