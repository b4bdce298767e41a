"""Start a server again when it dies: ``python -m sglang_optimal.launch_server --max-restarts N``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from sglang_optimal.server_process import die_with_parent

STEADY_SECONDS = 600.0
"""A server that ran this long was well; what happens later counts as its first failure."""
GRACE_SECONDS = 30.0
"""How long a server may take to stop when it is asked to."""
REFUSED = 2
"""Exit status of wrong arguments, which would be as wrong the next time."""


def supervise(command: Sequence[str], max_restarts: int, *, pause: float = 2.0) -> int:
    """Run ``command`` until it ends well, is stopped, refuses its arguments, or has failed too often in a row.

    SIGTERM, SIGINT and the end of the terminal (SIGHUP, unless it is ignored, as under nohup) are passed on as SIGTERM
    to the command alone, which ends its own processes in order. Whatever it leaves of its process group is killed
    before it is started again, so that no memory or port stays taken. The command dies with this process, also when
    that is killed.

    Args:
        command: the program and its arguments.
        max_restarts: failures in a row after which to give up.
        pause: seconds before the first restart; twice as long before each further one, a minute at most.

    Returns:
        the exit status: the command's own, 128 + n after signal n.
    """
    stopping = threading.Event()
    process: subprocess.Popen | None = None

    def stop(number, frame) -> None:
        stopping.set()
        if process is not None:
            process.send_signal(signal.SIGTERM)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, stop) for number in numbers}
    failures = 0
    try:
        while True:
            started = time.monotonic()
            process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
            if stopping.is_set():  # between the start and the assignment
                process.send_signal(signal.SIGTERM)
            status = _wait(process, stopping)
            _signal_group(process, signal.SIGKILL)
            if stopping.is_set() or status in (0, REFUSED):
                return status
            failures = 1 if time.monotonic() - started > STEADY_SECONDS else failures + 1
            if failures > max_restarts:
                _say(f"the server ended with status {status}; not started again after {max_restarts} restarts.")
                return status
            delay = min(pause * 2 ** (failures - 1), 60.0)
            _say(f"the server ended with status {status}; restart {failures} of {max_restarts} in {delay:.0f} s.")
            if stopping.wait(delay):
                return status
    finally:
        if process is not None:
            _signal_group(process, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen, stopping: threading.Event) -> int:
    """The exit status; after a stop, a server that does not go within the grace period is killed."""
    deadline = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(0.2)
            return status if status >= 0 else 128 - status
        if stopping.is_set():
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _say(message: str) -> None:
    print(f"sglang_optimal.launch_server: {message}", file=sys.stderr, flush=True)
