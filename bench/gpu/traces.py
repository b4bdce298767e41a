"""Where the host waits for the device in a trace of decode steps, as torch.profiler exports it for Chrome."""

from __future__ import annotations

import bisect
import collections
from typing import Any

WAITS = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuCtxSynchronize",
)
"""Calls that return when the device has done something."""

PAGEABLE = {"to host": "DtoH (Device -> Pageable)", "to device": "HtoD (Pageable -> Device)"}
"""Copies that go through memory the device cannot reach by itself: to the host, the call waits for them."""

OURS = "sglang_optimal/"

Event = dict[str, Any]


def waits(trace: dict[str, Any], step: str, skipped: int = 2) -> dict[str, Any]:
    """Count the waits of the thread that runs the steps.

    Args:
        trace: what `torch.profiler.profile.export_chrome_trace` writes.
        step: name of the spans that begin the steps; what follows one, up to the next, belongs to it.
        skipped: steps at the beginning that do not count: the profiler's own start lies in them.

    Returns:
        "steps"; "waits", "pageable_to_host", "pageable_to_device": of one step; "calls": {name: number in a step};
        "from": {function that called: number in a step}, the innermost outside PyTorch, if the trace has stacks;
        "ours": in a step, those of "from" that this package's files made; None without stacks.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = sorted((e for e in events if e.get("cat") == "user_annotation" and e["name"] == step), key=_begin)
    spans = spans[skipped:]
    if len(spans) < 2:
        raise ValueError(f"the trace has {len(spans) + skipped} steps; too few.")
    steps, begin, end = len(spans) - 1, spans[0]["ts"], spans[-1]["ts"]
    thread = (spans[0]["pid"], spans[0]["tid"])
    # In the order of time: most of a trace is of other threads, or Python's.
    calls = [e for e in events if _is_call(e) and (e["pid"], e["tid"]) == thread and begin <= e["ts"] < end]
    waiting = [e for e in calls if e["name"].removesuffix("_v2") in WAITS]
    copies = _copies(events, {e["args"].get("correlation") for e in calls if "Memcpy" in e["name"]})
    sources = _callers(events, thread, waiting)
    return {
        "steps": steps,
        "waits": len(waiting) / steps,
        **{f"pageable_{way.replace(' ', '_')}": copies[way] / steps for way in PAGEABLE},
        "calls": {name: n / steps for name, n in collections.Counter(e["name"] for e in waiting).items()},
        "from": {name: n / steps for name, n in collections.Counter(sources).items()},
        "ours": sum(name.startswith(OURS) or f"/{OURS}" in name for name in sources) / steps if sources else None,
    }


def _begin(event: Event) -> float:
    return event["ts"]


def _is_call(event: Event) -> bool:
    return event.get("cat") in ("cuda_runtime", "cuda_driver")


def _copies(events: list[Event], correlations: set[Any]) -> collections.Counter[str]:
    """Copies through pageable memory that those calls asked for."""
    found: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "gpu_memcpy" and event["args"].get("correlation") in correlations:
            for way, what in PAGEABLE.items():
                found[way] += what in event["name"]
    return found


def _callers(events: list[Event], thread: tuple[Any, Any], calls: list[Event]) -> list[str]:
    """Of each call the innermost Python function that runs it and is neither PyTorch's nor built in."""
    functions = sorted(
        (
            e
            for e in events
            if e.get("cat") == "python_function"
            and (e["pid"], e["tid"]) == thread
            and not e["name"].startswith(("<built-in", "torch/", "contextlib.py", "<"))
            and "/torch/" not in e["name"]
        ),
        key=_begin,
    )
    starts = [e["ts"] for e in functions]
    if not functions:
        return []
    return [_innermost(functions, bisect.bisect_right(starts, call["ts"]), call["ts"]) for call in calls]


def _innermost(functions: list[Event], before: int, moment: float) -> str:
    """The last that began before ``moment`` and lasts beyond it: functions of a thread are nested."""
    for event in reversed(functions[:before]):
        if event["ts"] + event["dur"] >= moment:
            return event["name"]
    return "unknown"
