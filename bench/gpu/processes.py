"""Commands in processes of their own, some at a time, each with a limit; of none is anything left."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

TIMED_OUT = 124
"""Status of a command that was ended at its limit, as of coreutils' ``timeout``."""
NO_TIME = -1000
"""Status of a command that the end of all came before: not started, or ended within its own limit."""


@dataclasses.dataclass(frozen=True)
class Job:
    """limit: seconds. log: takes all output. environment: over this process's own."""

    name: str
    command: list[str]
    limit: float
    log: Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ended:
    """status: exit status, negative for a signal. text: all output."""

    job: Job
    status: int
    seconds: float
    text: str


def engine_parser(
    description: str, engines: Iterable[str], *, output: str, models: str, port: int, limit: float, cores: int
) -> argparse.ArgumentParser:
    """The parser of a check that starts engines, each in a process of its own.

    Args:
        engines: their names.
        output, models: names in the scratch folder: where records go, and where tiny models are made.
        port: of the first engine. limit: seconds for all. cores: of each engine at a time.
    """
    scratch = Path(tempfile.gettempdir()) / "sglang-optimal-gpu"
    names, shown = list(engines), "Default: %(default)s."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--engines", nargs="+", choices=names, default=names, help="Default: all.")
    parser.add_argument("--output", type=Path, default=scratch / output, help=shown)
    parser.add_argument("--models", type=Path, default=scratch / models, help=f"Made if absent. {shown}")
    parser.add_argument("--logs", type=Path, default=scratch / "logs", help=shown)
    parser.add_argument(
        "--at-once", type=int, default=max(1, (os.cpu_count() or 1) // cores), help="Engines at a time."
    )
    parser.add_argument("--limit", type=float, default=limit, help=f"Seconds for all. {shown}")
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=port, help=argparse.SUPPRESS)
    return parser


def end_of(limit: float) -> float:
    """When ``limit`` seconds since this process's start are over, by ``time.monotonic``: whoever gave the limit counts
    the imports as well."""
    import psutil

    return time.monotonic() + limit - (time.time() - psutil.Process().create_time())


def run_all(jobs: Iterable[Job], at_once: int, folder: Path, end: float = math.inf) -> Iterator[Ended]:
    """Run the jobs in ``folder``, ``at_once`` at a time; each is given when it has ended.

    Args:
        end: when none goes on, by ``time.monotonic``.
    """
    waiting = list(jobs)
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    try:
        while waiting or running:
            late = time.monotonic() > end
            while waiting and (late or len(running) < at_once):
                job = waiting.pop(0)
                if late:
                    yield Ended(job, NO_TIME, 0.0, "")
                    continue
                running[_start(job, folder)] = job, time.monotonic()
            for process, (job, start) in list(running.items()):
                seconds = time.monotonic() - start
                status = process.poll()
                if status is None and (late or seconds > job.limit):
                    status = TIMED_OUT if seconds > job.limit else NO_TIME
                if status is None:
                    continue
                stop(process)
                del running[process]
                yield Ended(job, status, round(seconds, 1), job.log.read_text(errors="replace"))
            time.sleep(0.1)
    finally:
        for process in running:
            stop(process)


def _start(job: Job, folder: Path) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as log:
        return subprocess.Popen(
            job.command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started: engines' processes may have sessions of their own."""
    import psutil

    family = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -- results of a process that has an engine ---------------------------------------------------------------------------

_RESULT = "RESULT "
_SELF_CHECK = "error: self-check: "


def give_result(make: Callable[[], dict[str, Any]]) -> NoReturn:
    """Print what ``make`` returns, or the "error" that it raised, and leave at once, whatever an engine leaves."""
    try:
        record = make()
    except Exception as error:
        traceback.print_exc()
        record = {"error": f"{type(error).__name__}: {error}"[:600]}
    print(_RESULT + json.dumps(record), flush=True)
    os._exit(0)


def result(ended: Ended) -> dict[str, Any]:
    """What a process gave by `give_result`. Where there is an "error", the "tail" of its output is there as well, and
    the error is what the engine's self-check said, if that is why it did not start."""
    lines = [line.removeprefix(_RESULT) for line in ended.text.splitlines() if line.startswith(_RESULT)]
    named = {TIMED_OUT: "time limit", NO_TIME: "no time was left"}
    lost = {"error": named.get(ended.status, f"ended with status {ended.status} and no result")}
    record = json.loads(lines[-1]) if lines else lost
    if "error" in record:
        said = [line for line in ended.text.splitlines() if _SELF_CHECK in line]
        record |= {"tail": ended.text[-4000:], **({"error": said[-1][:600]} if said else {})}
    return record
