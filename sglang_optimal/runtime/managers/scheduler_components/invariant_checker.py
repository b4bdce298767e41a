"""SGLang's leak checker, which counts what the guest holds as well.

It runs whenever the scheduler is idle. With ``SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY=1`` it also runs after every
step, and with ``SGLANG_CHECK_KV_PAGE_INVARIANTS=1`` it then looks at every single slot; the soak test sets both.
"""

from __future__ import annotations

import dataclasses

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker

from sglang_optimal.runtime.mem_cache.guest_kv import GuestKV


@dataclasses.dataclass(kw_only=True, slots=True)
class MixedSchedulerInvariantChecker(SchedulerInvariantChecker):
    """``guest_kv``: whose slots to count."""

    guest_kv: GuestKV

    @classmethod
    def like(cls, checker: SchedulerInvariantChecker, guest_kv: GuestKV) -> MixedSchedulerInvariantChecker:
        """The same checker, with the guest's side."""
        names = [field.name for field in dataclasses.fields(SchedulerInvariantChecker)]
        return cls(guest_kv=guest_kv, **{name: getattr(checker, name) for name in names})

    def check_idle(self) -> None:
        """Report slots that nobody owns; only when nothing runs."""
        leak = leak_report(self.guest_kv)
        if leak is not None:
            self._report_leak("student pool", leak)

    def self_check_during_busy(self) -> None:
        """SGLang's, and the guest's slots."""
        # Explicit, because a class with slots is made anew, and super() would look for the old one.
        SchedulerInvariantChecker.self_check_during_busy(self)
        if self.get_last_batch() is None:
            return
        problem = busy_report(self.guest_kv, every_slot=envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get())
        assert problem is None, problem

    def _get_total_uncached_sizes(self) -> tuple[int, int]:
        """SGLang's, with what the guest holds in the host's pool."""
        full, swa = SchedulerInvariantChecker._get_total_uncached_sizes(self)
        return full + (private_tokens(self.guest_kv) if self.guest_kv.one_pool else 0), swa


def leak_report(kv: GuestKV) -> str | None:
    """None when idle accounting is right: every slot is free or evictable and no request holds any."""
    stats = kv.stats()
    # SGLang itself looks at the slots of a pool that is the host's.
    whole = kv.one_pool or (stats["free"] + stats["evictable"] == kv.size and stats["protected"] == 0)
    if not kv.one_pool and kv.states is not None and kv.states.available() != kv.states.size:
        return f"student KV leak while idle: {kv.states.available()} of {kv.states.size} states are free"
    return None if whole and not kv.num_active_reqs else f"student KV leak while idle: {stats}"


def private_tokens(kv: GuestKV) -> int:
    """Tokens whose slots belong to one request, and to no radix cache; of the last page all."""
    return sum(kv.private_tokens(req) for req in kv.active_reqs.values())


def busy_report(kv: GuestKV, *, every_slot: bool) -> str | None:
    """None when the accounting is right while requests run: every slot is free, in the tree, or one request's.

    Args:
        every_slot: look at the slots themselves, and not at their numbers alone (slow).
    """
    if kv.one_pool:
        return None  # SGLang's own report has them
    stats, private = kv.stats(), private_tokens(kv)
    known = stats["free"] + stats["evictable"] + stats["protected"] + private
    if known != kv.size:
        return f"student KV pool: {kv.size - known} slots are missing while busy: {stats}, private {private}"
    if not every_slot:
        return None
    pages = [kv.allocator.get_all_free_pages().cpu()]
    if stats["evictable"] + stats["protected"]:
        pages.append(_pages(kv, kv.tree.all_values_flatten()))
    pages += [_pages(kv, _private_slots(kv, req)) for req in kv.active_reqs.values()]
    each, counts = torch.cat(pages).unique(return_counts=True)
    if len(each) == kv.size // kv.page_size and bool((counts == 1).all()):
        return None
    return f"student KV pool: pages with more than one owner: {each[counts > 1].tolist()[:20]}; {stats}"


def _pages(kv: GuestKV, slots: torch.Tensor) -> torch.Tensor:
    """The pages of slots that begin with a page's first, each once."""
    return slots[:: kv.page_size].cpu().to(torch.int64) // kv.page_size


def _private_slots(kv: GuestKV, req: Req) -> torch.Tensor:
    state = req.mixing.guest.kv
    if not state.bound:
        return state.slots
    return kv.req_to_token_pool.req_to_token[req.kv.req_pool_idx, state.protected_len : kv.row_len(req)]
