"""A server that the run starts itself, starts again when it dies, and takes with it when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from sglang_optimal.distill.client import closed_at_once

START_DEADLINE = 1800.0
"""Seconds for a start: a large model is long on its way from a slow disk."""
STARTS = 5
"""Starts of a server in all; after that it is taken as broken."""


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
        self._port = server.get("port") or _free_port()
        content = {"mixing": mixing, "server": {**server, "host": "127.0.0.1", "port": self._port}}
        self._config.touch(mode=0o600)  # it may have an API key in it
        self._config.write_text(yaml.safe_dump(content, sort_keys=False))
        self._process: subprocess.Popen | None = None
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
        command = [sys.executable, "-m", "sglang_optimal.launch_server", "--config", str(self._config)]
        with self._log.open("ab") as log:
            before = log.tell()
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent
            )
        deadline = time.monotonic() + START_DEADLINE
        async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
            while True:
                status = self._running().poll()
                if status is not None:
                    raise ValueError(f"the server ended with status {status}: {self._said(before)}")
                with contextlib.suppress(httpx.TransportError), closed_at_once():
                    if (await http.get(f"{self.url}/health")).status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise ValueError(f"the server was not ready after {START_DEADLINE:.0f} s; see {self._log}")
                await asyncio.sleep(0.3)

    async def _watch(self) -> None:
        """Start it again when it dies; requests wait and are sent again meanwhile."""
        for _ in range(STARTS - 1):
            while self._running().poll() is None:
                await asyncio.sleep(0.5)
            await self._stop()  # what is left of it
            with contextlib.suppress(ValueError):
                await self._start()

    def _running(self) -> subprocess.Popen:
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process

    async def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            deadline = time.monotonic() + seconds
            while process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.poll()

    def _said(self, start: int) -> str:
        with self._log.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error:" in line.lower()]
        return errors[-1] if errors else f"{lines[-1] if lines else 'nothing'} (see {self._log})"


def _die_with_parent() -> None:
    """In the child: end with the run even when that is killed, or the server would keep the accelerator."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
