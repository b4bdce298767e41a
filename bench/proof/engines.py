"""The server that samples: one at a time, started when it is asked for."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from bench.proof.scales import Scale
from sglang_optimal.distill.server import OwnServer


class Engines:
    """Servers of two kinds: ``shared``, one model in both roles, and ``skilled``, a teacher of its own beside a student
    that can be updated.

    Args:
        model: the student's folder. teacher: the skilled one's. out: for logs.
    """

    def __init__(self, model: str, teacher: Path, scale: Scale, out: Path):
        self._model, self._teacher, self._scale, self._out = model, teacher, scale, out
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._kind: str | None = None
        self._server: OwnServer | None = None

    def url(self, kind: str) -> str:
        """Of a server of this kind; another one is stopped first.

        Raises:
            ValueError: it does not start; with what it said.
        """
        if self._server is None or self._kind != kind:
            self._stop()
            server = OwnServer(*self.settings(kind), self._out / f"server-{kind}.log")
            self._wait(server.__aenter__())
            self._kind, self._server = kind, server
        assert self._server is not None
        return self._server.url

    def settings(self, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """(mixing, server): sections of its file."""
        server: dict[str, Any] = {
            "model_path": self._model, "context_length": 1024, "max_running_requests": self._scale.concurrency,
            "max_total_tokens": self._scale.pool, "sleep_on_idle": True,
        }  # fmt: skip
        if self._scale.device != "cpu":
            server["mem_fraction_static"] = 0.5  # the trainer is on the same card
        if kind == "shared":
            return {"student_weights": "shared"}, server
        if not (self._teacher / "config.json").exists():
            raise ValueError(
                f"--out: {self._teacher} is not there, the skilled teacher of these results; give the folder of their "
                "runs, or another --results."
            )
        return (
            {"student_model_path": self._model, "student_weights": "separate"},
            {**server, "model_path": str(self._teacher)},
        )

    def close(self) -> None:
        self._stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            self._wait(server.__aexit__(None, None, None))

    def _wait(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
