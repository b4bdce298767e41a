"""A speculative engine whose number of drafts is set from outside, from step to step, by a number in a file."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable
from pathlib import Path

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.speculative.adaptive_draft_length import FixedDraftLength


class Control:
    """The file. ``write``: for the process that measures; ``read``: for the scheduler."""

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(b"\0")
        with path.open("r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def write(self, length: int) -> None:
        """Drafts in the steps from now on."""
        self._byte[0] = length

    def read(self) -> int:
        return self._byte[0]


class GivenDraftLength(FixedDraftLength):
    """The length that is in the file."""

    def __init__(self, longest: int, path: Path):
        super().__init__(longest)
        self._control = Control(path)

    def choose(self, rows: int) -> int:
        return min(self._control.read(), self.length)


def _run(path: Path, config: MixingConfig, *args, **kwargs) -> None:
    from sglang_optimal.runtime.managers.scheduler import run_mixed_scheduler_process
    from sglang_optimal.runtime.speculative import spec_worker as speculative_worker

    speculative_worker.FixedDraftLength = functools.partial(GivenDraftLength, path=path)
    run_mixed_scheduler_process(config, *args, **kwargs)


def scheduler_process(path: Path, config: MixingConfig) -> Callable[..., None]:
    """In place of ``MixedEngine.scheduler_process``."""
    return functools.partial(_run, path, config)
