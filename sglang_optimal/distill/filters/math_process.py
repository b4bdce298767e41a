"""math-verify in a process of its own: a sample that it never ends with costs seconds, and not the run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

LIMIT = 20.0
"""Seconds for one verdict. math-verify's own limits are signals, which wait while big numbers are multiplied."""
STARTING = 60.0
"""Seconds more for the first one: sympy's import on a busy machine."""


class MathProcess:
    """Asks `math_worker`, which is started with the first question and again after one that it did not survive.

    Not a pool of the standard library's: those cannot end a worker, and start one by importing the caller's __main__.

    Args:
        limit: seconds for a verdict.
    """

    def __init__(self, limit: float = LIMIT):
        self._limit = limit
        self._asking = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, said: str, expected: str) -> bool:
        """See `math_worker.mathematically_equal`. Safe from any thread, one question at a time.

        Raises:
            ValueError: there is no verdict: it took too long, or the answers cannot be compared.
        """
        with self._asking:
            limit = self._limit
            if self._process is None:
                self._process, limit = _started(), limit + STARTING
            answer = self._answer(self._process, json.dumps([said, expected]).encode() + b"\n", limit)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["equal"]

    def _answer(self, process: subprocess.Popen[bytes], question: bytes, limit: float) -> dict:
        assert process.stdin is not None and process.stdout is not None
        end = time.monotonic() + limit
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(question)
            process.stdin.flush()
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self._end()
                return {"error": f"no verdict within {self._limit:g} s"}
            piece = os.read(process.stdout.fileno(), 65536)  # what there is, without waiting for more
            if not piece:
                status = process.wait()
                self._end()
                return {"error": f"math-verify's process ended with status {status}"}
            line += piece
        return json.loads(line)

    def _end(self) -> None:
        if self._process is not None:
            _stop(self._process)
            self._process = None


def _started() -> subprocess.Popen[bytes]:
    worker = Path(__file__).with_name("math_worker.py")
    # -P: the modules beside the worker are not on its path.
    return subprocess.Popen(
        [sys.executable, "-P", str(worker)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, which ends its worker itself
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]


@functools.cache
def shared() -> MathProcess:
    """The one of this process, for all filters."""
    return MathProcess()
