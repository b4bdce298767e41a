"""What a mixed request's answers say about its mixing, for handlers that only see text: the OpenAI routes."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import AsyncGenerator, Callable
from typing import Any

from sglang_optimal.names import ALL_SERIES, PROMPTS, TOP_K
from sglang_optimal.scores import SCORED
from sglang_optimal.top_k import public

SERIES_RECORDER: contextvars.ContextVar[SeriesRecorder | None] = contextvars.ContextVar("series_recorder", default=None)
"""Set while a handler starts a request that it wants to follow."""


def series_of(meta_info: dict[str, Any], start: int = 0) -> dict[str, list[float]]:
    """The per-token series in ``meta_info``, from token ``start`` on; empty for a plain request.

    The most likely tokens are as they come from the scheduler, or as a client gets them (then ``start`` is 0).
    """
    series = {name: meta_info[name][start:] for name in ALL_SERIES if meta_info.get(name) is not None}
    if isinstance(meta_info.get(TOP_K), list):
        series[TOP_K] = meta_info[TOP_K][start:]
    elif TOP_K in meta_info:
        series[TOP_K] = meta_info[TOP_K]
    return series


def for_client(series: dict[str, Any]) -> dict[str, Any]:
    """The same with the most likely tokens as a client gets them."""
    tokens = series.get(TOP_K)
    return {**series, TOP_K: public(tokens)} if isinstance(tokens, list) else series


async def changed(
    outputs: AsyncGenerator[Any, None], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> AsyncGenerator[Any, None]:
    """Yield what ``outputs`` yields, an output or a list of them, each as ``change`` makes it."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            yield [change(part) for part in output] if isinstance(output, list) else change(output)


def with_scores(output: dict[str, Any], text_of: Callable[[list[int]], str]) -> dict[str, Any]:
    """The output; an answer about a given completion is the completion, with what was made of it.

    Args:
        text_of: gives the text of token ids.
    """
    meta_info = output.get("meta_info")
    if not isinstance(meta_info, dict) or not meta_info.get(SCORED):
        return output
    (scored,) = meta_info[SCORED]
    ids = scored.token_ids
    own = {
        "prompt_tokens": meta_info["prompt_tokens"] - len(ids),
        "completion_tokens": len(ids),
        "finish_reason": {"type": "length", "length": len(ids)},
    }
    rest = {name: value for name, value in meta_info.items() if name != SCORED}
    return {**output, "text": text_of(ids), "output_ids": ids, "meta_info": {**rest, **scored.meta_info(), **own}}


def with_public_top_k(output: dict[str, Any]) -> dict[str, Any]:
    """The output with `for_client` of its ``meta_info``."""
    meta_info = output.get("meta_info")
    if isinstance(meta_info, dict) and isinstance(meta_info.get(TOP_K), list):
        return {**output, "meta_info": for_client(meta_info)}
    return output


def prompts_of(meta_info: dict[str, Any]) -> dict[str, Any]:
    """What both models read, where it was asked for."""
    return {name: meta_info[name] for name in PROMPTS if name in meta_info}


class SeriesRecorder:
    """Remembers the series of each choice until they are taken.

    Args:
        incremental: whether an output has the series of its own tokens alone (``--incremental-streaming-output``) and
            not those of all tokens so far; None: as SGLang is configured.
    """

    def __init__(self, incremental: bool | None = None) -> None:
        self._incremental = incremental
        self._seen: dict[int, int] = {}
        self._waiting: dict[int, dict[str, Any]] = {}

    async def wrap(self, outputs: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what ``outputs`` yields."""
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                self._keep(output.get("index", 0), output["meta_info"])
                yield output

    def _keep(self, index: int, meta_info: dict[str, Any]) -> None:
        if self._incremental is None:
            self._incremental = _sglang_is_incremental()
        new = series_of(meta_info, 0 if self._incremental else self._seen.get(index, 0))
        self._seen[index] = self._seen.get(index, 0) + len(new.get("alpha", ()))
        waiting = self._waiting.setdefault(index, {})
        for name, values in new.items():
            if isinstance(values, dict):  # of a completion that was scored: all at once
                waiting[name] = values
            else:
                waiting.setdefault(name, []).extend(values)
        waiting.update(prompts_of(meta_info))

    def pop_new(self, index: int) -> dict[str, Any]:
        """Series of the tokens of choice ``index`` that were not taken before; prompts with the last of them."""
        series = for_client(self._waiting.pop(index, {}))
        return series if series.get("alpha") or prompts_of(series) else {}


def _sglang_is_incremental() -> bool:
    from sglang.srt.runtime_context import get_serving

    return get_serving().incremental_streaming_output
