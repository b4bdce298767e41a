"""Times the parts of every step inside the scheduler process, from outside: hooks around the methods, nothing changed.

A step lasts from one ``run_batch`` of the scheduler to the next. Marks divide it without gaps: each says which part
goes on from there, and what lies inside no hook is ``UNACCOUNTED``. There are two clocks:

    host    ``time.perf_counter`` at the mark
    device  on CUDA, an event recorded at the mark on the stream of the forwards. It completes when that stream has
            done all that was launched before, so work of the host behind which the stream is busy takes no time here,
            and work that the stream waits for takes all of its time: the critical path.

Events are read when the scheduler is idle, never between steps. One line of JSON is then appended to a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pkgutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.managers.scheduler import run_mixed_scheduler_process
from sglang_optimal.runtime.managers.shared_tp_worker import SharedTpModelWorker

STUDENT, TEACHER, BOTH = "student forward", "teacher forward", "forward of both"
MIXING = "mixing"
SAMPLER, EXTRAS = "sampler", "extras of the token"
PLANNING, PREPARATION, RESULTS, REQUESTS = (
    "planning the student",
    "batch preparation",
    "result processing",
    "receiving requests",
)
WAITING = "host waits for device"
UNACCOUNTED = "unaccounted"

GROUPS: dict[str, tuple[str, ...]] = {
    STUDENT: (STUDENT,),
    TEACHER: (TEACHER,),
    BOTH: (BOTH,),
    MIXING: (MIXING,),
    "sampling": (SAMPLER, EXTRAS),
    "scheduling": (PLANNING, PREPARATION, RESULTS, REQUESTS),
    WAITING: (WAITING,),
    UNACCOUNTED: (UNACCOUNTED,),
}
"""What the report shows, and the parts it consists of.

mixing: solving alpha and the mixture. sampler: SGLang's, with the bias, penalties and masks before it. planning: with
the student's slots. batch preparation: choosing the batch, the teacher's slots, the forwards' inputs, handing the
result over to the copy and to the next step.
"""


@dataclasses.dataclass
class _Step:
    """decode: whether a decode batch. batch, mixed: rows, and how many are mixed. graph: every forward of it was a
    graph's replay. marks: (part that begins, host seconds, event)."""

    decode: bool
    batch: int
    marks: list[tuple[str, float, torch.cuda.Event | None]]
    mixed: int = 0
    graph: bool = True

    @property
    def kind(self) -> tuple[bool, int, int]:
        return self.decode, self.batch, self.mixed

    def durations(self) -> dict[str, dict[str, float]]:
        """Milliseconds of each part by clock; they add up to the step."""
        clocks: dict[str, dict[str, float]] = {"host": {}}
        if self.marks[0][2] is not None:
            clocks["device"] = {}
        for (part, begin, event), (_, end, next_event) in zip(self.marks, self.marks[1:], strict=False):
            clocks["host"][part] = clocks["host"].get(part, 0.0) + 1e3 * (end - begin)
            if event is not None:
                clocks["device"][part] = clocks["device"].get(part, 0.0) + event.elapsed_time(next_event)
        return clocks


class StepTimer:
    """Collects the marks of the scheduler process. ``path``: the file to append to."""

    def __init__(self, path: Path):
        self._path = path
        self._cuda = torch.cuda.is_available()
        self._stream: torch.cuda.Stream | None = None
        self._part = UNACCOUNTED
        self._step: _Step | None = None  # the one that runs
        self._steps: list[_Step] = []  # those that have ended, since the last time that nothing ran

    # -- marks -----------------------------------------------------------------------------------------------------

    def _now(self) -> tuple[float, torch.cuda.Event | None]:
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
        return time.perf_counter(), event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside is the part's, except what a part within it takes."""
        outer, self._part = self._part, name
        if self._step is not None:
            self._step.marks.append((name, *self._now()))
        try:
            yield
        finally:
            self._part = outer
            if self._step is not None:
                self._step.marks.append((outer, *self._now()))

    def _next_step(self, scheduler, batch) -> None:
        if self._cuda:
            self._stream = scheduler.forward_stream if scheduler.enable_overlap else torch.cuda.current_stream()
        mark = (self._part, *self._now())
        self._end_step(mark)
        self._step = _Step(batch.forward_mode.is_decode(), len(batch.reqs), [mark])

    def _end_step(self, mark) -> None:
        if self._step is not None:
            self._step.marks.append(mark)
            self._steps.append(self._step)
            self._step = None

    def _flush(self) -> None:
        """Write the full decode steps between two of the same kind: whichever step's result is processed in it, and
        whichever batch is prepared in it, is like it."""
        self._step = None  # the last one runs into the pause
        steps, self._steps = self._steps, []
        steady = [
            step
            for before, step, after in zip(steps, steps[1:], steps[2:], strict=False)
            if step.decode and before.kind == step.kind == after.kind
        ]
        if not steady:
            return
        if self._cuda:
            steps[-1].marks[-1][2].synchronize()
        largest = max(step.batch for step in steady)
        lines = [
            {"batch": step.batch, "mixed": step.mixed, "graph": step.graph, **step.durations()}
            for step in steady
            if step.batch == largest
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(lines) + "\n")

    # -- hooks: called with the original and its arguments -----------------------------------------------------------

    def install(self) -> None:
        """Register the hooks; SGLang puts them on before it builds the scheduler."""
        scheduler = "sglang.srt.managers.scheduler.Scheduler"
        runner = "sglang.srt.model_executor.model_runner.ModelRunner"
        step = "sglang_optimal.runtime.sampling.sampler.MixingStep"
        hooks: dict[str, Callable[..., Any]] = {
            f"{scheduler}.run_batch": self._run_batch,
            f"{scheduler}.process_batch_result": self._process_batch_result,
            f"{scheduler}.on_idle": self._on_idle,
            f"{scheduler}.get_next_batch_to_run": self._around(PREPARATION),
            f"{scheduler}.ingest_requests": self._around(REQUESTS),
            "sglang_optimal.runtime.managers.schedule_batch.Planner.plan": self._plan,
            f"{runner}.forward": self._forward,
            f"{runner}.sample": self._around(SAMPLER),
            f"{step}.mix_into": self._around(MIXING),
            "sglang_optimal.runtime.sampling.sampling_observer.MixingObserver.after_sample": self._around(EXTRAS),
        }
        for target, hook in hooks.items():
            pkgutil.resolve_name(target)  # the registry would only log that a name is gone
            HookRegistry.register(target, hook, HookType.AROUND)

    def _around(self, part: str) -> Callable[..., Any]:
        def hook(original, *args, **kwargs):
            with self.part(part):
                return original(*args, **kwargs)

        return hook

    def _run_batch(self, original, scheduler, batch, *args, **kwargs):
        self._worker = scheduler.tp_worker
        self._next_step(scheduler, batch)
        with self.part(PREPARATION):
            return original(scheduler, batch, *args, **kwargs)

    def _plan(self, original, *args, **kwargs):
        with self.part(PLANNING):
            plan = original(*args, **kwargs)
        if plan is not None and self._step is not None:
            self._step.mixed = len(plan.rows.row_ids)
        return plan

    def _forward(self, original, runner, *args, **kwargs):
        step = self._step
        if step is None:  # a warm-up
            return original(runner, *args, **kwargs)
        part = TEACHER
        if runner is not self._worker.model_runner:
            part = STUDENT
        elif step.mixed and isinstance(self._worker, SharedTpModelWorker):
            part = BOTH
        with self.part(part):
            output = original(runner, *args, **kwargs)
        step.graph = step.graph and bool(output.can_run_graph)
        return output

    def _process_batch_result(self, original, scheduler, batch, result, *args, **kwargs):
        if self._cuda and result.copy_done is not None:
            result.copy_done = _TimedWait(self, result.copy_done)
        with self.part(RESULTS):
            return original(scheduler, batch, result, *args, **kwargs)

    def _on_idle(self, original, *args, **kwargs):
        self._flush()
        return original(*args, **kwargs)


class _TimedWait:
    """A result's event, whose ``synchronize`` is the one place where the host waits for the device."""

    def __init__(self, timer: StepTimer, event):
        self._timer = timer
        self._event = event

    def synchronize(self) -> None:
        with self._timer.part(WAITING):
            self._event.synchronize()

    def __getattr__(self, name: str):
        return getattr(self._event, name)


# -- processes ---------------------------------------------------------------------------------------------------------


def run_timed_scheduler_process(path: Path, config: MixingConfig, server_args, port_args, gpu_id, tp_rank, *rest):
    """The package's scheduler process, its first tensor-parallel rank timed."""
    if tp_rank == 0:
        StepTimer(path).install()
    run_mixed_scheduler_process(config, server_args, port_args, gpu_id, tp_rank, *rest)


def scheduler_process(path: Path, config: MixingConfig) -> Callable[..., None]:
    """In place of ``MixedEngine.scheduler_process``: what a process gets is pickled."""
    return functools.partial(run_timed_scheduler_process, path, config)


class StepLog:
    """Reads, in another process, what a timer appends to ``path``."""

    def __init__(self, path: Path):
        self._path = path
        self._read = 0  # bytes

    def take(self) -> list[dict[str, Any]]:
        """The steps written since the last call: {"batch", "mixed", "graph", clock: {part: ms}}."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        return [step for line in new.splitlines() for step in json.loads(line)]

    def wait(self, batch: int, mixed: int, timeout: float = 30.0) -> list[dict[str, Any]]:
        """The steps of ``batch`` rows, ``mixed`` of them mixed, of the call that has just returned.

        Raises:
            RuntimeError: there were none.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            steps = [step for step in self.take() if (step["batch"], step["mixed"]) == (batch, mixed)]
            if steps:
                return steps
            time.sleep(0.05)
        raise RuntimeError(
            f"no steady decode step of {batch} rows: raise --output-len, or the pool (--max-total-tokens)."
        )
