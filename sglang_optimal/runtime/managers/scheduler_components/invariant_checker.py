"""SGLang's leak checker, which counts what students hold as well.

It runs whenever the scheduler is idle. With ``SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY=1`` it also runs after every
step, and with ``SGLANG_CHECK_KV_PAGE_INVARIANTS=1`` it then looks at every single slot; the soak test sets both.
"""

from __future__ import annotations

import dataclasses

from sglang.srt.environ import envs
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker

from sglang_optimal.runtime.mem_cache.student_kv import StudentKV


@dataclasses.dataclass(kw_only=True, slots=True)
class MixedInvariantChecker(SchedulerInvariantChecker):
    """``student_kv``: whose slots to count."""

    student_kv: StudentKV

    @classmethod
    def like(cls, checker: SchedulerInvariantChecker, student_kv: StudentKV) -> MixedInvariantChecker:
        """The same checker, with the student's side."""
        names = [field.name for field in dataclasses.fields(SchedulerInvariantChecker)]
        return cls(student_kv=student_kv, **{name: getattr(checker, name) for name in names})

    def check_idle(self) -> None:
        """Report slots that nobody owns; only when nothing runs."""
        leak = self.student_kv.leak_report()
        if leak is not None:
            self._report_leak("student pool", leak)

    def self_check_during_busy(self) -> None:
        # Explicit, because a class with slots is made anew, and super() would look for the old one.
        SchedulerInvariantChecker.self_check_during_busy(self)
        if self.get_last_batch() is None:
            return
        problem = self.student_kv.busy_report(every_slot=envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get())
        assert problem is None, problem

    def _get_total_uncached_sizes(self) -> tuple[int, int]:
        full, swa = SchedulerInvariantChecker._get_total_uncached_sizes(self)
        return full + self.student_kv.private_tokens_of_teacher(), swa
