"""A server that the run starts itself, starts again when it dies, and takes with it when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import yaml

from sglang_optimal.server_process import ServerFailed, ServerProcess, free_port

START_DEADLINE = 1800.0
"""Seconds for a start: a large model is long on its way from a slow disk."""
STARTS = 5
"""Starts of a server in all; after that it is taken as broken."""


class SharedServer:
    """One server of several runs, started when the first of them needs it and stopped when the block ends.

    Args:
        mixing, server: the sections of their file.
        log: file for what it prints.
    """

    def __init__(self, mixing: dict[str, Any], server: dict[str, Any], log: Path):
        self._sections, self._log = (mixing, server), log
        self._stack = contextlib.AsyncExitStack()
        self._own: OwnServer | None = None

    async def __aenter__(self) -> SharedServer:
        return self

    async def __aexit__(self, *exc_info) -> None:
        await self._stack.aclose()

    async def url(self) -> str:
        """Where it is. Raises ValueError: it does not start."""
        if self._own is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            own = OwnServer(*self._sections, self._log)
            self._own = await self._stack.enter_async_context(own)
        return self._own.url


class OwnServer:
    """``python -m sglang_optimal.launch_server`` on a free port of this machine.

    Args:
        mixing, server: the sections of the run's file.
        log: file for what it prints.

    Example:
        >>> async with OwnServer({}, {"model_path": "models/teacher"}, Path("server.log")) as server:
        ...     print(server.url)
    """

    def __init__(self, mixing: dict[str, Any], server: dict[str, Any], log: Path):
        self._log = log
        self._config = log.with_name("server.yaml")
        self._port = server.get("port") or free_port()
        content = {"mixing": mixing, "server": {**server, "host": "127.0.0.1", "port": self._port}}
        self._config.touch(mode=0o600)  # it may have an API key in it
        self._config.write_text(yaml.safe_dump(content, sort_keys=False))
        self._process: ServerProcess | None = None
        self._watcher: asyncio.Task | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> OwnServer:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc_info) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self._stop()

    async def _start(self) -> None:
        """Raises ValueError when it ends at once, with what it said."""
        argv = ["--config", str(self._config)]
        self._process = server = ServerProcess("sglang_optimal.launch_server", argv, self.url, self._log)
        deadline = time.monotonic() + START_DEADLINE
        try:
            while not await asyncio.to_thread(server.is_ready):
                if time.monotonic() > deadline:
                    raise ValueError(f"the server was not ready after {START_DEADLINE:.0f} s; see {self._log}")
                await asyncio.sleep(0.3)
        except ServerFailed as error:
            raise ValueError(str(error)) from None

    async def _watch(self) -> None:
        """Start it again when it dies; requests wait and are sent again meanwhile.

        Not `supervise`, which cannot tell a first start that fails, and ends the run, from a server that died.
        """
        for _ in range(STARTS - 1):
            while self._process is not None and self._process.process.poll() is None:
                await asyncio.sleep(0.5)
            await self._stop()  # what is left of it
            with contextlib.suppress(ValueError):
                await self._start()

    async def _stop(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._process.stop, 15.0)
