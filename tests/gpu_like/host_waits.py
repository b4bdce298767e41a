"""Counts what would make the host wait for a GPU in a decode step, where our own code asks for it.

A CPU has one kind of memory, so this looks at what is asked, not at what it costs: numbers taken from a tensor, lists
and masks as indices, copies that may block. What SGLang's own code asks for is SGLang's.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

import sglang_optimal

OURS = (str(Path(sglang_optimal.__file__).parent), str(Path(__file__).with_name("faults.py")))
# (file, function): why it may
ALLOWED = {
    ("sampler.py", "make_samplable"): "looks on a CPU only",
    ("verify.py", "_not_finite"): "looks on a CPU only",
    ("mixture.py", "mix"): "hands over to numba",
    ("guest_kv.py", "stats"): "counters of the host",
}
# Folders and files that no GPU runs.
CPU_ONLY = ("/platforms/", "/mixing/fused_cpu.py")

counts: dict[str, int] = {"decode_steps": 0}
waits: dict[str, int] = {}
_active = False


def install() -> None:
    """In a scheduler process, before the scheduler is made."""
    from sglang_optimal.runtime.managers.scheduler import MixedScheduler

    run_batch, state = MixedScheduler.run_batch, MixedScheduler.get_internal_state

    def watched(self, batch, *args, **kwargs):
        global _active
        _active = batch.forward_mode.is_decode()
        counts["decode_steps"] += _active
        try:
            return run_batch(self, batch, *args, **kwargs)
        finally:
            _active = False

    def with_counts(self, recv_req):
        from gpu_like import flashinfer_indices
        from gpu_like.imitation import RecordedGraphs

        output = state(self, recv_req)
        replays = {"replays": RecordedGraphs.replays, "padded_replays": RecordedGraphs.padded_replays}
        output.internal_state["gpu_like"] = {
            **counts,
            **replays,
            "host_waits": dict(waits),
            "flashinfer_plans": dict(flashinfer_indices.plans),
            "self_check": self.gpu_like_self_check(),
        }
        return output

    MixedScheduler.gpu_like_self_check = _self_check
    MixedScheduler.run_batch, MixedScheduler.get_internal_state = watched, with_counts
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select"):
        _watch(torch.Tensor, name)
    for name in ("__bool__", "__int__", "__float__", "__index__"):
        _watch(torch.Tensor, name)
    for name in ("nonzero", "unique", "masked_select"):
        _watch(torch, name)
    _watch(torch.Tensor, "to", _blocks)
    _watch(torch, "tensor", lambda *args, device=None, **kwargs: device is not None)
    _watch(torch, "as_tensor", lambda *args, device=None, **kwargs: device is not None)
    _watch(torch.Tensor, "__getitem__", _looks)
    _watch(torch.Tensor, "__setitem__", _looks)
    _watch(torch.Tensor, "repeat_interleave", lambda tensor, repeats, *args, **kwargs: torch.is_tensor(repeats))


def _self_check(self) -> str | None:
    """What the start-up's check finds with the fault that is in force now; None where nobody asks, "" for nothing."""
    from gpu_like import faults
    from sglang_optimal.runtime.managers.self_check import SelfCheck, SelfCheckError

    if not faults.self_check_wanted():
        return None
    try:
        SelfCheck(self).run()
    except SelfCheckError as error:
        return str(error)
    return ""


def _blocks(tensor, *args, non_blocking: bool = False, device=None, **kwargs) -> bool:
    target = device if device is not None else (args[0] if args else None)
    return isinstance(target, str | torch.device) and not non_blocking


def _looks(tensor, index, *value) -> bool:
    """Whether an index has to be known on the host, or is copied from there."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list)
        or (torch.is_tensor(part) and (part.dtype == torch.bool or (part.dim() == 0 and not part.is_floating_point())))
        for part in parts
    )


def _watch(owner: Any, name: str, waits_for: Any = None) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args, **kwargs):
        if _active and (waits_for is None or waits_for(*args, **kwargs)):
            _note(name)
        return original(*args, **kwargs)

    setattr(owner, name, watched)


def _note(name: str) -> None:
    frame = sys._getframe(2)
    path = frame.f_code.co_filename
    if not path.startswith(OURS) or any(part in path for part in CPU_ONLY):
        return
    file, function = path.rpartition("/")[2], frame.f_code.co_name
    if (file, function) not in ALLOWED:
        where = f"{name} in {file}:{function}"
        waits[where] = waits.get(where, 0) + 1
