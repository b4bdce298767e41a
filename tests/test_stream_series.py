"""Each token's series reach a stream once, whether SGLang sends them all again with every output or in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import runtime_context
from sglang.srt.managers.tokenizer_manager import _slice_streaming_output_meta_info

from sglang_optimal.runtime.entrypoints.openai.serving_chat import _with_stream_series
from sglang_optimal.runtime.entrypoints.openai.stream_series import SERIES_RECORDER, SeriesRecorder

# (choice, its new tokens), in the order in which they come
PIECES = [(0, [1]), (1, [101]), (0, [2, 3]), (0, []), (1, [102, 103, 104]), (0, [4]), (1, [105])]


def series(tokens: list[int]) -> dict[str, list[float]]:
    return {"alpha": [token / 10 for token in tokens], "kl_to_student": [token / 100 for token in tokens]}


async def outputs(incremental: bool) -> AsyncIterator[dict[str, Any]]:
    """What the tokenizer manager yields for one request with n = 2; in pieces as it cuts them."""
    so_far: dict[int, list[int]] = {0: [], 1: []}
    for index, tokens in PIECES:
        before = len(so_far[index])
        so_far[index] += tokens
        meta_info = {"id": "x", **series(so_far[index])}
        if incremental:
            _slice_streaming_output_meta_info(meta_info, before, series([]).keys())
        yield {"index": index, "meta_info": meta_info}


async def drain(
    recorder: SeriesRecorder, incremental: bool, take_after: dict[int, list[int]]
) -> list[dict[str, list[float]]]:
    """What is taken: ``take_after``: {number of the output: choices that an event is written for then}."""
    taken = []
    position = 0
    async for _ in recorder.wrap(outputs(incremental)):
        taken += [recorder.pop_new(index) for index in take_after.get(position, ())]
        position += 1
    return taken


@pytest.mark.parametrize("incremental", [False, True])
def test_an_event_for_every_output(incremental):
    every = {position: [index] for position, (index, _) in enumerate(PIECES)}
    taken = asyncio.run(drain(SeriesRecorder(incremental), incremental, every))
    assert taken == [series(tokens) if tokens else {} for _, tokens in PIECES]


@pytest.mark.parametrize("incremental", [False, True])
def test_events_that_wait_for_more(incremental):
    """A parser may hold text back, and SGLang writes the reasons of all choices at the end."""
    taken = asyncio.run(drain(SeriesRecorder(incremental), incremental, {2: [0, 1], 6: [0, 1, 1]}))
    assert taken == [series([1, 2, 3]), series([101]), series([4]), series([102, 103, 104, 105]), {}]


@pytest.mark.parametrize("incremental", [False, True])
def test_the_recorder_asks_sglang(monkeypatch, incremental):
    serving = SimpleNamespace(incremental_streaming_output=incremental)
    monkeypatch.setattr(runtime_context, "get_serving", lambda: serving)
    assert asyncio.run(drain(SeriesRecorder(), incremental, {4: [0, 1]})) == [
        series([1, 2, 3]),
        series([101, 102, 103, 104]),
    ]


@pytest.mark.parametrize("incremental", [False, True])
def test_a_plain_request_has_none(incremental):
    async def run() -> dict[str, list[float]]:
        async def plain():
            yield {"meta_info": {"id": "x"}}

        recorder = SeriesRecorder(incremental)
        async for _ in recorder.wrap(plain()):
            pass
        return recorder.pop_new(0)

    assert asyncio.run(run()) == {}


@pytest.mark.parametrize("incremental", [False, True])
def test_the_events_of_a_stream(monkeypatch, incremental):
    """As on an OpenAI route: a first event names the role, one follows each output with text, the last the end."""
    serving = SimpleNamespace(incremental_streaming_output=incremental)
    monkeypatch.setattr(runtime_context, "get_serving", lambda: serving)

    def event(index: int, **choice) -> str:
        return f"data: {json.dumps({'choices': [{'index': index, **choice}]})}\n\n"

    async def events() -> AsyncIterator[str]:
        position = 0
        async for output in SERIES_RECORDER.get().wrap(outputs(incremental)):
            if position == 0:
                yield event(0, delta={"role": "assistant", "content": ""})
            if position not in (1, 2):  # held back
                yield event(output["index"], delta={"content": "…"})
            position += 1
        yield event(0, delta={}, finish_reason="stop")

    async def collect() -> dict[int, list[float]]:
        alphas: dict[int, list[float]] = {0: [], 1: []}
        async for line in _with_stream_series(events()):
            chunk = json.loads(line.removeprefix("data: "))
            for choice, values in zip(chunk["choices"], chunk.get("sglext", {}).get("mixing", ()), strict=False):
                alphas[choice["index"]] += values.get("alpha", [])
        return alphas

    wanted = {index: [t / 10 for i, tokens in PIECES if i == index for t in tokens] for index in (0, 1)}
    assert asyncio.run(collect()) == wanted
