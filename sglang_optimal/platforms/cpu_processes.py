"""On a machine without an accelerator an engine's processes begin with SGLang imported: they are forked from a process
that imports it while this one does.

Importing SGLang takes 10 s, and SGLang starts its processes anew, each of which would import it after this one has. A
process with an accelerator cannot be forked, so there it stays as it is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_MARK = "SGLANG_OPTIMAL_FORKSERVER"
_MODULES = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang_optimal.runtime.managers.scheduler",
)
_NOT_COMPARED = {"PYTEST_CURRENT_TEST"}
"""Variables that change all the time and that no imported module reads."""
_ACCELERATORS = ("nvidiactl", "nvidia0", "dxg", "kfd", "dri", "accel", "davinci_manager", "hl0", "mthreads.0")


class ForkServer:
    """The one of this process.

    Attributes:
        pid: its process id; None before there is one.
        environment: when it began, with what the start of engines has changed since.
        fits: whether there is one, with the environment of now.
        in_use: whether SGLang's next processes come from it.
    """

    def __init__(self) -> None:
        self.pid: int | None = None
        self.environment: dict[str, str] = {}
        self.fits = False
        self.in_use = False
        self._left: list[int] = []
        """Process ids of those before that have not ended."""

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Start an engine within: the process that its own are forked from begins to import SGLang at once.

        Another one takes its place where the environment has changed: a module may have read it when it was imported.
        Another program's fork server is left alone; SGLang then starts its processes as ever.
        """
        before = _environment()
        if self.pid is not None and (self.environment != before or _has_ended(self.pid)):
            self._leave()
        if self.pid is None:
            self.environment = before
            self.fits = self._start()
        try:
            yield
        finally:
            after = _environment()
            for name in before.keys() - after.keys():
                self.environment.pop(name, None)
            self.environment.update(after.items() - before.items())

    def _leave(self) -> None:
        """Let go of the one there is. It ends with the last process that came from it."""
        server: Any = forkserver._forkserver
        os.close(server._forkserver_alive_fd)  # which those processes have too
        server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None
        forkserver.set_forkserver_preload(["__main__"])
        left = self._left if self.pid is None else [*self._left, self.pid]
        self._left = [pid for pid in left if not _has_ended(pid)]
        self.pid, self.fits = None, False

    def _start(self) -> bool:
        """Whether it could."""
        server: Any = forkserver._forkserver
        taken = server._forkserver_pid is not None or server._preload_modules != ["__main__"]
        if sys.platform != "linux" or taken or any(Path("/dev", name).exists() for name in _ACCELERATORS):
            return False
        before = {name: os.environ.get(name) for name in (_MARK, "PYTHONPATH", "PYTHONSAFEPATH")}
        # Python 3.11 gives its fork server nothing of sys.path.
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        os.environ.update({_MARK: "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": path})
        try:
            forkserver.set_forkserver_preload([__name__])
            forkserver.ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
        self.pid = server._forkserver_pid
        return True

    @contextlib.contextmanager
    def used(self, server_args) -> Iterator[None]:
        """Let SGLang launch its processes from the fork server within, where there is one that fits.

        All functions that it runs in them must be `InChild`.
        """
        import torch

        # SGLang's further processes are started by these, and tell them, not the process that forks, when they fail.
        alone = server_args.dp_size == server_args.tokenizer_worker_num == server_args.detokenizer_worker_num == 1
        self.in_use = self.fits and alone and not torch.accelerator.is_available()
        try:
            yield
        finally:
            if self.in_use:
                multiprocessing.set_start_method("spawn", force=True)  # as SGLang leaves it
            self.in_use = False

    def choose_start_method(self, *_: Any, **__: Any) -> None:
        """Hook after SGLang has chosen ``spawn``."""
        if self.in_use:
            multiprocessing.set_start_method("forkserver", force=True)


def _has_ended(pid: int) -> bool:
    """Of a child: such as with all others, when an engine of SGLang's own shuts down."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _NOT_COMPARED}


fork_server = ForkServer()


class InChild:
    """A function that a forked process runs as one that was started anew would.

    Args:
        function: to run; it has to be picklable.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __getstate__(self) -> tuple[Callable[..., Any], dict[str, str]]:
        return self._function, dict(os.environ)

    def __setstate__(self, state: tuple[Callable[..., Any], dict[str, str]]) -> None:
        self._function, self._environment = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it with the environment of the process that asked for it, and end when that process does."""
        with contextlib.suppress(ImportError):
            import setproctitle

            setproctitle.getproctitle()  # it finds the place of the title by the environment's, which moves below
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        # SGLang asks the kernel to end a process with its parent, which is the fork server here, and that one lives as
        # long as any of its children does.
        threading.Thread(target=_end_with_parent, name="sglang-optimal-parent", daemon=True).start()
        return self._function(*args, **kwargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Import much within: the collector would take a fifth of the time, and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _preload() -> None:
    """What the fork server does before it forks."""
    import logging
    import warnings

    from sglang_optimal.server_process import die_with_parent

    # Until it listens to its parent it would not notice that one's end, after a wrong argument for example. Later the
    # kernel would take the end of the thread that started it for that of the program.
    die_with_parent()
    # SGLang's processes tell their parent with this signal that they failed.
    signal.signal(signal.SIGQUIT, lambda *_: os.kill(os.getppid(), signal.SIGQUIT))
    # What is said here is said again by the process that asks, which imports the same.
    logging.disable(logging.WARNING)
    # Whatever is wrong here is wrong in the processes too, where it can be told.
    with without_gc(), warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):
        for module in _MODULES:
            importlib.import_module(module)
    logging.disable(logging.NOTSET)
    die_with_parent(0)
    gc.freeze()  # the collector would write to every page that is shared with the children


if os.environ.pop(_MARK, None):
    _preload()
