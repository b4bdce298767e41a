"""Servers of the suite begin as forks of one process that has imported SGLang.

A server imports it twice, in its own process and in the one that its processes are forked from: 20 of its 25 s beside
another worker of the suite. Under pytest-xdist, `serving.serve` asks here; alone, and with variables of their own for
the server, tests begin ``python -m`` as ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_optimal.server_process import ServerProcess, die_with_parent

ADDRESS = "SGLANG_OPTIMAL_TESTS_WARM_PYTHON"
"""The variable with the path of its socket."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of every server of the tests."""
MODULES = ("sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager", "sglang.srt.models.registry",
           "sglang.srt.entrypoints.http_server", "sglang_optimal.runtime.managers.scheduler")  # fmt: skip


@contextlib.contextmanager
def started() -> Iterator[None]:
    """It listens within; it imports nothing before it is asked."""
    with tempfile.TemporaryDirectory(prefix="warm-python-") as folder:
        path = str(Path(folder) / "socket")
        variables = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        process = subprocess.Popen([sys.executable, __file__, path], env=variables, preexec_fn=die_with_parent)
        os.environ[ADDRESS] = path
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            process.kill()
            process.wait()


class ForkedServer(ServerProcess):
    """One that is a fork of the process above."""

    def _started(self, module: str, argv: Sequence[str], output: Any, environment: Mapping[str, str]) -> Any:
        return _Process(module, argv, str(self.log.resolve()), environment)

    def stop(self, grace: float = 20.0) -> bool:
        """As by Ctrl-C: SGLang looks for a SIGTERM every 5 s."""
        self.process.send_signal(signal.SIGINT)
        return super().stop(grace)


class _Process:
    """What `ServerProcess` needs of a ``subprocess.Popen``."""

    def __init__(self, module: str, argv: Sequence[str], log: str, environment: Mapping[str, str]):
        self._handler = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 30
        while True:
            try:
                self._handler.connect(os.environ[ADDRESS])
                break
            except OSError:  # it has just been started
                assert time.monotonic() < deadline, "tests/server/warm_python.py does not listen"
                time.sleep(0.1)
        asked = {"module": module, "argv": list(argv), "log": log, "environment": dict(environment), "cwd": os.getcwd()}
        self._lines = self._handler.makefile("rw")
        self._lines.write(json.dumps(asked) + "\n")
        self._lines.flush()
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._handler], [], [], 0)[0]:
            self.returncode = int(self._lines.readline() or -signal.SIGKILL)
            self._lines.close()
            self._handler.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._handler], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked server", timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status


def main(path: str) -> None:
    """Serve until killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # handlers are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            asked = json.loads(connection.makefile("r").readline())
            _import()
            if os.fork() == 0:
                listener.close()
                _end_with(_handle, connection, asked)
            connection.close()


def _import() -> None:
    if gc.isenabled():
        gc.disable()
        logging.disable(logging.WARNING)  # each server would have said it
        with warnings.catch_warnings(action="ignore"):
            for module in MODULES:
                importlib.import_module(module)
        logging.disable(logging.NOTSET)
        gc.freeze()
        assert threading.active_count() == 1


def _handle(connection: socket.socket, asked: dict[str, Any]) -> int:
    """Begin the server, say its process id and how it ended; it ends with the one who asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent()
    pid = os.fork()
    if pid == 0:
        connection.close()
        _end_with(_serve, asked)
    connection.sendall(f"{pid}\n".encode())
    while True:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            with contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            return 0
        if select.select([connection], [], [], 0.05)[0]:  # nobody says anything more but that they are gone
            os.kill(pid, signal.SIGKILL)


def _serve(asked: dict[str, Any]) -> int:
    """As ``python -m module argv`` with this environment."""
    os.setsid()
    die_with_parent()
    os.chdir(asked["cwd"])
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(asked["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(asked["environment"])
    from multiprocessing import util

    util.spawnv_passfds = _spawn_warm(util.spawnv_passfds)
    sys.argv[1:] = asked["argv"]
    gc.enable()
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _spawn_warm(spawn):
    """``multiprocessing``'s start of a process, where a fork server is one more fork: it has imported all that it
    would."""

    def spawned(path, args, keep):
        code = args[-1]
        if "multiprocessing.forkserver" not in code:
            return spawn(path, args, keep)
        pid = os.fork()
        if pid == 0:
            _end_with(_fork_server, code, set(map(int, keep)))
        return pid

    return spawned


def _fork_server(code: str, keep: set[int]) -> int:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    from multiprocessing import forkserver

    from sglang_optimal.platforms import cpu_processes

    forkserver._forkserver._lock = threading.Lock()  # it was forked within
    os.environ.pop(cpu_processes._MARK, None)
    cpu_processes._preload()
    with contextlib.suppress(SystemExit):
        exec(code, {})
    return 0


def _end_with(function, *args: Any) -> None:
    """Run it in a fork, which never returns."""
    status = 1
    try:
        status = function(*args)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
