"""How long steps keep the device busy, without waiting for it."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class _HostEvent:
    """A moment, for devices whose work is done when the call returns."""

    def record(self) -> None:
        self.now = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1e3 * (end.now - self.now)


class StepTimer:
    """Times what is put on the current stream within ``step``; what the stream still had to do before does not count.

    Args:
        device: of the stream; its module must offer timing events, as CUDA's does, or be the CPU.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._running: collections.deque[tuple[Any, Any, Any]] = collections.deque()

    @contextlib.contextmanager
    def step(self, what: Any) -> Iterator[None]:
        """Times the block, unless it raises; ``what`` comes back with the time."""
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._running.append((what, start, end))

    def finished(self) -> Iterator[tuple[Any, float]]:
        """(what, seconds) of the steps that have ended since the last call, in their order."""
        while self._running and self._running[0][2].query():
            what, start, end = self._running.popleft()
            yield what, start.elapsed_time(end) / 1e3

    def _event(self) -> Any:
        if self._device.type == "cpu":
            return _HostEvent()
        return torch.get_device_module(self._device).Event(enable_timing=True)
