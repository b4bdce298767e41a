"""What the checks put into a scheduler's process, from outside: counts of forwards, layers that take float32, traces.

Each is a function that is called in that process before it builds its scheduler; `in_schedulers` says so for engines
of the package, `stock_engine` for SGLang's own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

Setup = Callable[[], None]


def _run_mixed(setups: tuple[Setup, ...], config, *args, **kwargs) -> None:
    from sglang_optimal.runtime.managers.scheduler import run_mixed_scheduler_process

    for setup in setups:
        setup()
    run_mixed_scheduler_process(config, *args, **kwargs)


def _run_stock(setups: tuple[Setup, ...], *args, **kwargs) -> None:
    from sglang.srt.managers.scheduler import run_scheduler_process

    for setup in setups:
        setup()
    run_scheduler_process(*args, **kwargs)


@contextlib.contextmanager
def in_schedulers(*setups: Setup) -> Iterator[None]:
    """Engines of the package that start within call ``setups``, which are pickled, in their schedulers' processes."""
    from sglang_optimal.runtime.entrypoints.engine import MixedEngine

    def process(config):
        return functools.partial(_run_mixed, setups, config)

    with mock.patch.object(MixedEngine, "scheduler_process", staticmethod(process)):
        yield


def stock_engine(*setups: Setup, **arguments: Any):
    """SGLang's own engine, with ``setups`` in its scheduler's process."""
    from sglang.srt.entrypoints import engine

    class Engine(engine.Engine):
        run_scheduler_process_func = staticmethod(functools.partial(_run_stock, setups))

    return Engine(**arguments)


def count_forwards() -> None:
    """Count the forwards of each model; they stand in the scheduler's internal state as "forwards":
    {"<folder of the model> prefill" or "… decode": {"graph": n, "eager": n}}."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_optimal.runtime.managers.scheduler import MixedScheduler

    counts: dict[str, dict[str, int]] = {}
    forward, state = ModelRunner.forward, MixedScheduler.get_internal_state

    @functools.wraps(forward)
    def counted(runner, forward_batch, *args, **kwargs):
        output = forward(runner, forward_batch, *args, **kwargs)
        phase = "decode" if forward_batch.forward_mode.is_decode() else "prefill"
        kinds = counts.setdefault(f"{Path(runner.model_config.model_path).name} {phase}", {"graph": 0, "eager": 0})
        kinds["graph" if output.can_run_graph else "eager"] += 1
        return output

    @functools.wraps(state)
    def with_counts(scheduler, request):
        output = state(scheduler, request)
        output.internal_state["forwards"] = {name: dict(kinds) for name, kinds in counts.items()}
        return output

    ModelRunner.forward, MixedScheduler.get_internal_state = counted, with_counts


def layers_take_float32() -> None:
    """SGLang's CUDA kernels of these layers take 16-bit floats only; in float32 let PyTorch's own code run."""
    import torch

    if not torch.cuda.is_available():
        return
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    def either(layer: type, tensor: int) -> None:
        """``tensor``: number of the argument whose type decides."""
        kernel = layer.forward_cuda

        @functools.wraps(kernel)
        def forward_cuda(self, *args, **kwargs):
            given = [*args, *kwargs.values()][tensor]
            if given.dtype == torch.float32:
                return self.forward_native(*args, **kwargs)
            return kernel(self, *args, **kwargs)

        layer.forward_cuda = forward_cuda

    either(RMSNorm, 0)
    either(SiluAndMul, 0)
    either(RotaryEmbedding, 1)


# -- traces of decode steps --------------------------------------------------------------------------------------------

STEP = "decode step"
"""Name of the span of each step in a trace: from the scheduler's ``run_batch`` on."""


class StepTracer:
    """Traces some decode steps with torch.profiler, once there have been enough of the same batch in a row.

    Two traces come of it: ``plain.json``, and ``stacks.json`` with the Python functions, which costs more and is
    only for seeing where waits come from.

    Args:
        folder: for the traces. batch: requests of a step. steady: steps before the first trace. steps: of a trace.
    """

    TRACES = {"plain": False, "stacks": True}

    def __init__(self, folder: Path, batch: int, steady: int, steps: int):
        self.folder, self.batch, self.steady, self.steps = folder, batch, steady, steps
        self._left = list(self.TRACES)
        self._in_a_row = 0
        self._profiler = None

    def install(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", self.run_batch, HookType.AROUND)

    def run_batch(self, original, scheduler, batch, *args, **kwargs):
        from torch.profiler import record_function

        full = batch.forward_mode.is_decode() and len(batch.reqs) == self.batch
        self._in_a_row = self._in_a_row + 1 if full else 0
        if self._profiler is not None and (not full or self._in_a_row == self.steady + self.steps):
            self._end(complete=full)
        if self._profiler is None and self._left and self._in_a_row == self.steady:
            self._begin()
        if self._profiler is None:
            return original(scheduler, batch, *args, **kwargs)
        with record_function(STEP):
            return original(scheduler, batch, *args, **kwargs)

    def _begin(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profiler = profile(activities=activities, with_stack=self.TRACES[self._left[0]])
        self._profiler.start()

    def _end(self, complete: bool) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if complete:  # else the same trace is tried again
            name = self._left.pop(0)
            unfinished = self.folder / f"{name}.part"
            profiler.export_chrome_trace(str(unfinished))
            unfinished.rename(self.folder / f"{name}.json")
        self._in_a_row = 0


def trace_steps(folder: Path, batch: int, steady: int, steps: int) -> None:
    """`StepTracer` in this process, to be pickled with `functools.partial`."""
    StepTracer(folder, batch, steady, steps).install()
