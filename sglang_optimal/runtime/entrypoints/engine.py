"""SGLang's in-process engine, with a student."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils import kill_process_tree

from sglang_optimal.config import MixingConfig
from sglang_optimal.event_loop import LoopThread
from sglang_optimal.platforms.cpu_processes import InChild, fork_server
from sglang_optimal.runtime import launch
from sglang_optimal.runtime.managers.scheduler import scheduler_process
from sglang_optimal.runtime.managers.tokenizer_manager import tokenizer_manager_init

_running: weakref.WeakSet[MixedEngine] = weakref.WeakSet()
_failed: list[MixedEngine] = []


class MixedEngine(Engine):
    """One of the engines of this process; each has a configuration of its own.

    Args:
        server_args: SGLang's, as `launch.checked_server_args` resolves them.
        config: the student and the defaults, resolved.

    Raises:
        ValueError: SGLang's configuration of the process cannot serve this engine beside one that runs.
        SelfCheckFailed: see `launch.starting`.
    """

    scheduler_process: Callable[[MixingConfig], Callable[..., None]] = staticmethod(scheduler_process)
    """Makes the function that a scheduler process runs, a server's too, which has to be picklable; tests and benchmarks
    have others."""

    def __init__(self, server_args, config: MixingConfig):
        for other in _running:
            if (other.mixing_config.longest_draft > 0) != (config.longest_draft > 0):
                raise ValueError(
                    "mixing_mode: an engine that drafts and one that does not cannot run in one process, where SGLang "
                    "has one configuration; shut the first down, or start one of them in a process of its own."
                )
        self.mixing_config: MixingConfig = config
        self._manager: TokenizerManager | None = None
        self._init_manager = tokenizer_manager_init(config)
        self.init_tokenizer_manager_func = self._keeping_its_manager
        self.run_scheduler_process_func = InChild(self.scheduler_process(config))
        self.run_detokenizer_process_func = InChild(run_detokenizer_process)
        try:
            with launch.starting(), fork_server.used(server_args):
                super().__init__(server_args=server_args)
        except BaseException:
            # At the program's end it would kill every child of the process; its own have ended.
            atexit.unregister(self.shutdown)
            _failed.append(self)  # see `_keeping_its_manager`
            raise
        self.loop = LoopThread()  # from any thread, and inside a notebook's running loop
        _running.add(self)

    def _keeping_its_manager(self, *args):
        """Make the tokenizer manager, and let it live as long as the engine, also where the engine does not start.

        As garbage its ZMQ context may be finalized before its sockets are, and then waits for them for ever: the
        program would stop in some later allocation.
        """
        self._manager, templates = self._init_manager(*args)
        return self._manager, templates

    def shutdown(self) -> None:
        """End this engine's processes. SGLang would kill every child of the process: other engines' and the user's."""
        if self in _running:
            _running.discard(self)
            self.loop.close()
            self._end_processes()
        super().shutdown()

    def _end_processes(self) -> None:
        launched = self._scheduler_init_result
        launched.stop_grpc_server()
        self.tokenizer_manager._subprocess_watchdog.stop()
        self._terminate_weight_cache_daemons(self._weight_cache_daemon_procs)
        self.send_to_rpc.close(linger=0)
        for pid in launched.all_child_pids:
            kill_process_tree(pid, wait_timeout=60)
        self._attached = True  # as of an engine whose processes are another's: SGLang only cleans up in this process
