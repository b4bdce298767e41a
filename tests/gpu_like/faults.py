"""The faults that the emulation was made for, put back one at a time while the engine runs: each must be noticed.

The name of the one that is in force stands in the file that `FILE` names; a test writes it there with `put_back`.
Those that act while the engine is built are in force if they stand there at its start.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "GPU_LIKE_FAULT"

WRONG_LOGITS = {
    "student-view": "the student's logits are a view of the buffer that the teacher's forward writes",
    "first-view": "so are those of rows that are not drafted for, beside drafted ones",
}
WRONG_LOGITS_SHARED = {"teacher-view": "the teacher's logits are a view of what the student's prefill writes"}
ROWS = {
    "old-ids": "padded rows read what the other model left in the ids",
    "requests-for-rows": "logits are split by requests where beam search has more rows",
}
STALE_TABLE = "stale-table"
"""What refers to the table of rows refers to the one before the guest's half came; acts while an engine is built."""
RAISED = {
    "no-memory": "the distributions of a speculative step do not fit the memory",
    "student-raises": "the forward of both sides' rows raises, with shared weights",
}
HOST_WAITS = {
    "indexed-by-number": "DraftTemperature picks a factor by a number on the device",
    "blocking-copy": "lengths for the verification are made on the host",
    "list-index": "rows of logits are chosen by a list",
    "rows-by-list": "rows of the lengths on the CPU are chosen on the device",
}


def file() -> Path:
    """Of this process; one in all its tests, since engines are forked where the environment is as it was."""
    return Path(os.environ[FILE])


@contextlib.contextmanager
def put_back(name: str) -> Iterator[None]:
    """Let a fault be in force within, in all engines of this test that imitate a GPU."""
    path = file()
    path.write_text(name)
    try:
        yield
    finally:
        path.write_text("")


@contextlib.contextmanager
def self_check_asked() -> Iterator[None]:
    """Within, engines answer a look at their state with what their self-check finds."""
    path = file().with_suffix(".check")
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def self_check_wanted() -> bool:
    return file().with_suffix(".check").exists()


def in_force() -> str:
    return file().read_text()


def install() -> None:
    """In a scheduler process: make every fault possible."""
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    from sglang_optimal.runtime.core import MixedRows
    from sglang_optimal.runtime.managers import guest_tp_worker, schedule_batch
    from sglang_optimal.runtime.managers import shared_tp_worker as shared_worker
    from sglang_optimal.runtime.sampling.sampler import MixingStep
    from sglang_optimal.runtime.speculative import spec_worker as speculative_worker
    from sglang_optimal.runtime.speculative.draft_temperature import DraftTemperature

    def as_they_are(output) -> Any:
        return output.logits_output

    _fault("student-view", guest_tp_worker, "kept", as_they_are)
    _fault("teacher-view", shared_worker, "kept", as_they_are)
    _fault("indexed-by-number", DraftTemperature, "sharpened", _indexed_by_number)
    _fault("blocking-copy", speculative_worker, "_ahead", _blocking_ahead)
    _fault("list-index", MixingStep, "apply_logit_transforms", _list_index)
    _fault("rows-by-list", MixedRows, "select_cpu", _rows_by_list)
    _fault(STALE_TABLE, shared_worker.SharedTpModelWorker, "alloc_memory_pool", _stale_table)
    for module in (shared_worker, schedule_batch):
        _fault("requests-for-rows", module, "rows_of", lambda batch: len(batch.reqs))
    _fault("old-ids", DecodeCudaGraphRunner, "load_batch", _with_old_ids(DecodeCudaGraphRunner.load_batch))
    _fault("no-memory", speculative_worker, "token_values", _no_memory)
    _fault("student-raises", shared_worker.SharedTpModelWorker, "_forward_both", _raises)
    _view_of_first()


def _fault(name: str, owner: Any, attribute: str, wrong: Any) -> None:
    right = getattr(owner, attribute)

    @functools.wraps(right)
    def either(*args, **kwargs):
        return (wrong if in_force() == name else right)(*args, **kwargs)

    setattr(owner, attribute, either)


def _indexed_by_number(self, truncation):
    return truncation.scaled(self._factors[self._overlaps.argmax()])


def _blocking_ahead(seq_lens, k: int):
    import torch

    more = torch.arange(1, k + 1).repeat_interleave(len(seq_lens))
    return seq_lens.repeat(k) + more.to(seq_lens.device)


def _list_index(self, width: int, info) -> None:
    full = self.guest_logits.float().new_zeros((len(info), width))
    size = self.support.size
    full[self.rows.row_ids, :size] = self.guest_logits.float()[:, :size]
    info.apply_logits_bias(full)
    self.guest_logits = self.rows.select(full)


def _with_old_ids(load_batch):
    from sglang.srt.model_executor.cuda_graph_buffer_registry import PaddingPolicy

    def load(self, *args, **kwargs):
        slot = self.buffer_registry.get_slot("input_ids")
        policy, slot.padding_policy = slot.padding_policy, PaddingPolicy.FOREACH_COPY
        try:
            return load_batch(self, *args, **kwargs)
        finally:
            slot.padding_policy = policy

    return load


def _no_memory(*args):
    import torch

    raise torch.OutOfMemoryError("injected: no memory")


def _raises(*args):
    raise RuntimeError("injected: out of luck")


def _rows_by_list(self, tensor):
    return tensor if self.device_row_ids is None else tensor[self.device_row_ids.tolist()]


def _stale_table(self, *args, **kwargs) -> None:
    from sglang.srt.managers.tp_worker import TpModelWorker

    from sglang_optimal.runtime.mem_cache.guest_kv import GuestReqToTokenPool, SharedGuestKV

    TpModelWorker.alloc_memory_pool(self, *args, **kwargs)
    runner = self.model_runner
    # What lies behind the stale table is read; here it is zeros, and not whatever memory holds.
    table = runner.req_to_token_pool.req_to_token
    table.set_(table.new_zeros((2 * len(table), table.shape[1])).untyped_storage(), 0, table.shape, table.stride())
    self._rows = GuestReqToTokenPool(runner.req_to_token_pool)
    self._pools_are_there(SharedGuestKV(self._rows, runner.token_to_kv_pool_allocator, self.adapter))


def _view_of_first() -> None:
    """The guest's logits of the first position are not cloned for the rows that are not drafted for."""
    from sglang_optimal.runtime.managers.guest_tp_worker import GuestTpModelWorker
    from sglang_optimal.runtime.speculative.spec_worker import MixingSpecWorker

    right, forward = MixingSpecWorker._draft, GuestTpModelWorker.forward_decode
    given: list[Any] = []

    def forward_decode(self, *args, **kwargs):
        given.append(forward(self, *args, **kwargs))
        return given[-1]

    def draft(self, *args, **kwargs):
        given.clear()
        drafted = right(self, *args, **kwargs)
        if in_force() == "first-view" and drafted.lockstep_logits is not None:
            drafted.lockstep_logits = given[0]
        return drafted

    GuestTpModelWorker.forward_decode, MixingSpecWorker._draft = forward_decode, draft
