"""An event loop in a thread of its own, so that an engine can be asked from any thread, and from any other loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Takes the place of the loop in SGLang's Engine, which asks nothing of it but ``run_until_complete``.

    SGLang's own sync calls drive the loop of the calling thread: one thread at a time, and not inside a running loop,
    such as a notebook's.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-optimal-loop", daemon=True)
        self._thread.start()

    def run_until_complete(self, awaitable: Awaitable[T]) -> T:
        """Wait in this thread until the loop's thread has run ``awaitable``."""
        future = self._submit(awaitable)
        try:
            return future.result()
        except BaseException:  # KeyboardInterrupt reaches this thread, not the loop's
            future.cancel()
            raise

    async def run(self, awaitable: Awaitable[T]) -> T:
        """Wait in the caller's own event loop."""
        if threading.current_thread() is self._thread:
            return await awaitable
        return await asyncio.wrap_future(self._submit(awaitable))

    async def iterate(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Iterate in the caller's own event loop over what an async generator of this loop yields."""
        try:
            while True:
                try:
                    item = await self.run(anext(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            await self.run(items.aclose())

    def _submit(self, awaitable: Awaitable[Any]):
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking call from the engine's own event loop; await it instead.")
        return asyncio.run_coroutine_threadsafe(_as_coroutine(awaitable), self._loop)

    def close(self) -> None:
        """Stop the loop; what still runs on it is cancelled. Safe to call again."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def _cancel_others() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
