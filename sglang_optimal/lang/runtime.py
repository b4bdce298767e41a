"""A server with a student, started from a Python program: ``sgl.Runtime`` for two models."""

from __future__ import annotations

import atexit
import multiprocessing
import time
from typing import Any

import requests
from sglang.lang.backend.runtime_endpoint import Runtime as SglRuntime
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from sglang_optimal.config import SETTINGS, MixingConfig


class Runtime(SglRuntime):
    """Starts ``sglang_optimal.launch_server`` in a process of its own; a backend for frontend programs.

    Args:
        model_path: Hugging Face id or folder of the teacher.
        student_model_path: the same for the student.
        log_level: of the server.
        launch_timeout: seconds to wait until it answers.
        **arguments: mixing settings (``alpha_method``, ``student_max_total_tokens``, …, see MixingConfig) and any
            argument of SGLang's ServerArgs.

    Raises:
        ValueError: names the argument.
        RuntimeError: the server ended while starting; its messages are on standard error.
        TimeoutError: it did not answer in time.

    Example:
        >>> runtime = so.Runtime(model_path="T", student_model_path="S")
        >>> sgl.set_default_backend(runtime)
        >>> …
        >>> runtime.shutdown()
    """

    def __init__(
        self,
        model_path: str,
        student_model_path: str,
        *,
        log_level: str = "error",
        launch_timeout: float = 300.0,
        **arguments: Any,
    ):
        self.pid: int | None = None  # first: SGLang's __del__ reads it
        from sglang_optimal.launch_server import start_server_process

        mixing = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
        config = MixingConfig.from_dict({**mixing, "student_model_path": str(student_model_path)}, "Runtime")
        arguments.setdefault("port", _free_port(30000))
        # Not a `ServerProcess`: SGLang's arguments are Python values here, and not all of them can be written as flags.
        context = multiprocessing.get_context("spawn")
        self.server_args, process = start_server_process(
            context, str(model_path), config, {"log_level": log_level, **arguments}
        )
        self.pid = process.pid
        self.url = self.server_args.url()
        self.generate_url = self.url + "/generate"
        atexit.register(self.shutdown)
        self._wait_until_ready(process, time.monotonic() + launch_timeout)
        self.endpoint = RuntimeEndpoint(self.url, api_key=self.server_args.api_key)

    def _wait_until_ready(self, process, deadline: float) -> None:
        key = self.server_args.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.url}/health_generate", headers=headers, timeout=20).status_code == 200:
                    return
            except requests.RequestException:
                pass  # not listening yet
            if not process.is_alive():
                self.shutdown()
                raise RuntimeError("Runtime: the server ended while starting; see its messages above.")
            time.sleep(0.5)
        self.shutdown()
        raise TimeoutError("Runtime: the server did not answer within launch_timeout.")

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()


def _free_port(first: int) -> int:
    from sglang.srt.utils.network import is_port_available

    return next(port for port in range(first, 40000) if is_port_available(port))
