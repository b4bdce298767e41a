"""A server in a process of its own: started, waited for and ended in one way by runs, benchmarks and tests."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import requests

PAUSE = 0.2
"""Seconds between two questions whether it is ready."""

TAIL = 6000
"""Characters of its output that go with an error of `running`."""

logger = logging.getLogger(__name__)


class PortTaken(ValueError):
    """A server cannot listen where it was told to."""


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time; the message has what it said last."""


class ServerProcess:
    """``python -m module argv`` in a session of its own, so that whatever it starts can be ended with it.

    It dies with this process, also when that is killed: else it would keep the accelerator.

    Args:
        module: ``sglang_optimal.launch_server``, or SGLang's own.
        argv: its arguments.
        url: where it will answer.
        log: file that everything it prints is added to.
        environment: variables beside this process's own.
    """

    def __init__(
        self,
        module: str,
        argv: Sequence[str],
        url: str,
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ):
        self.url, self.log = url, log
        with log.open("ab") as output:
            self._begin = output.tell()
            self.process = self._started(module, argv, output, {**os.environ, **(environment or {})})

    def _started(
        self, module: str, argv: Sequence[str], output: IO[bytes], environment: Mapping[str, str]
    ) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def is_ready(self, headers: Mapping[str, str] | None = None) -> bool:
        """Whether it answers; asks once.

        Args:
            headers: for its API key.

        Raises:
            ServerFailed: it has ended.
        """
        status = self.process.poll()
        if status is not None:
            raise ServerFailed(f"the server ended with status {status}: {self.last_words()}")
        with contextlib.suppress(requests.RequestException), requests.Session() as session:
            session.trust_env = False  # no proxy lies between this machine and itself
            return session.get(f"{self.url}/health", headers=headers, timeout=30).status_code == 200
        return False

    def wait_until_ready(self, seconds: float, headers: Mapping[str, str] | None = None) -> None:
        """Ask until it answers.

        Raises:
            ServerFailed: it ended, or did not within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while not self.is_ready(headers):
            if time.monotonic() > deadline:
                raise ServerFailed(f"the server was not ready after {seconds:.0f} s; see {self.log}")
            time.sleep(PAUSE)

    def stop(self, grace: float = 20.0) -> bool:
        """End it: SIGTERM, as a user would, to it alone, so that it ends its requests and has its schedulers give their
        memory back. What is left of its session after ``grace`` seconds, or when it has ended, is killed.

        Returns:
            Whether it went by itself; else there is a warning.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(grace)
            return True
        except subprocess.TimeoutExpired:
            logger.warning("%s: the server did not end within %.0f s and is killed; see %s", self.url, grace, self.log)
            return False
        finally:  # also when Ctrl-C ends the wait
            self.signal(signal.SIGKILL)
            self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to all of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def said(self) -> str:
        """What it printed."""
        with self.log.open("rb") as log:
            log.seek(self._begin)
            return log.read().decode(errors="replace").strip()

    def last_words(self) -> str:
        """The last error that it printed, or its last line."""
        lines = self.said().splitlines()
        errors = [line for line in lines if "error:" in line.lower()]
        return errors[-1] if errors else f"{lines[-1] if lines else 'nothing'} (see {self.log})"


@contextlib.contextmanager
def running(
    module: str,
    argv: Sequence[str],
    log: Path,
    *,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    grace: float = 20.0,
    process: type[ServerProcess] = ServerProcess,
) -> Iterator[ServerProcess]:
    """A server on a free port of this machine, ready within the block.

    Args:
        argv: its arguments, without the port.
        seconds: for the start. grace: for the end. process: what starts it. The others: see `ServerProcess`.

    Raises:
        ServerFailed: it did not start; the message has the end of what it said.
    """
    port = free_port()
    server = process(module, [*argv, "--port", str(port)], f"http://127.0.0.1:{port}", log, environment=environment)
    try:
        try:
            server.wait_until_ready(seconds, headers)
        except ServerFailed as error:
            raise ServerFailed(f"{error}\n{server.said()[-TAIL:]}") from None
        yield server
    finally:
        server.stop(grace)


def free_port() -> int:
    """A port of this machine that nothing listens on, and that no connection takes before a server begins to listen."""
    for port in random.Random(os.urandom(8)).sample(range(10_000, _first_port_of_connections()), 1000):
        with contextlib.suppress(PortTaken), hold_port("127.0.0.1", port):
            return port
    raise PortTaken("port: of a thousand below those that connections take, none is free.")


def _first_port_of_connections() -> int:
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    return max(int(path.read_text().split()[0]), 12_000) if path.exists() else 32_768


@contextlib.contextmanager
def hold_port(host: str, port: int) -> Iterator[None]:
    """Within, a server of this process or its children can take this port, and no connection.

    Raises:
        PortTaken: another server has it, or the host is not this machine's.
    """
    with contextlib.ExitStack() as held:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            holder = held.enter_context(socket.socket(family, kind, protocol))
            # With this two sockets may be bound to it; the one that listens gets the connections.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(address)
        except OSError as error:
            raise PortTaken(f"--port: cannot listen on {host}:{port}: {error.strerror}; choose another.") from None
        yield


def die_with_parent(with_signal: int = signal.SIGKILL) -> None:
    """In a child: end with the parent, also when that is killed.

    Args:
        with_signal: what ends it; 0: not any more.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, with_signal)
