"""An engine in a process of its own: SGLang has one configuration a process, and kinds of engines differ in theirs."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import time
from pathlib import Path
from typing import Any

from bench import drafts_control


class EngineProcess:
    """Starts an engine elsewhere and asks it.

    Args:
        teacher, student: model folders; without a student, SGLang's own engine.
        control: where the number of drafts is read from, see `bench.drafts_control`; None: the package's own choice.
        **arguments: of `sglang_optimal.OptimalSampler`, or of SGLang's engine.
    """

    def __init__(self, teacher: str, student: str | None = None, control: Path | None = None, **arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, teacher, student, control, arguments))
        self._process.start()
        self._pipe.recv()

    def generate(self, **arguments: Any) -> tuple[float, list[tuple[int, int]]]:
        """Seconds of a call of SGLang's ``Engine.generate``; tokens and decode steps (with drafts) of each answer."""
        self._pipe.send(("generate", arguments))
        return self._pipe.recv()

    def serve(
        self, concurrency: int, input_ids: list[list[int]], sampling_params: list[dict[str, Any]]
    ) -> tuple[float, list[tuple[int, int]]]:
        """`generate` for requests of their own, of which ``concurrency`` run at a time."""
        arguments = {"concurrency": concurrency, "input_ids": input_ids, "sampling_params": sampling_params}
        self._pipe.send(("serve", arguments))
        return self._pipe.recv()

    def flush_cache(self) -> None:
        self._pipe.send(("flush", {}))
        self._pipe.recv()

    def shutdown(self) -> None:
        self._pipe.send(("stop", {}))
        self._process.join(60)


def _serve(pipe, teacher: str, student: str | None, control: Path | None, arguments: dict[str, Any]) -> None:
    if student is None:
        import sglang

        engine = sglang.Engine(model_path=teacher, **arguments)
    else:
        from sglang_optimal import OptimalSampler
        from sglang_optimal.runtime.entrypoints.engine import MixedEngine

        if control is not None:
            MixedEngine.scheduler_process = staticmethod(functools.partial(drafts_control.scheduler_process, control))
        engine = OptimalSampler(teacher, student, **arguments).engine
    pipe.send(True)
    while True:
        what, call = pipe.recv()
        if what == "stop":
            engine.shutdown()
            return
        if what == "flush":
            engine.flush_cache()
            pipe.send(True)
            continue
        start = time.perf_counter()
        outputs = engine.generate(**call) if what == "generate" else _closed_loop(engine, **call)
        seconds = time.perf_counter() - start
        pipe.send((seconds, [(len(o["output_ids"]), o["meta_info"].get("spec_verify_ct", 0)) for o in outputs]))


def _closed_loop(engine, concurrency: int, input_ids: list, sampling_params: list) -> list[dict[str, Any]]:
    async def one(ids: list[int], params: dict[str, Any]) -> dict[str, Any]:
        async with free:
            return await engine.async_generate(input_ids=ids, sampling_params=params)

    async def every() -> list[dict[str, Any]]:
        return await asyncio.gather(*map(one, input_ids, sampling_params))

    free = asyncio.Semaphore(concurrency)
    return engine.loop.run_until_complete(every())
