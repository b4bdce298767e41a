"""A scheduler process whose models go wrong for the requests whose ids say so.

``<side>-<fault>-<n>-…``: from about the n-th token on, ``student`` or ``teacher`` gives ``nan`` or ``inf`` for this
request, or (student only) ``raise``s in the forward that it is part of.
"""

from __future__ import annotations

import functools

import torch


def faulty_scheduler_process(config):
    """In place of `MixedEngine.scheduler_process`."""
    return functools.partial(_run, config)


def _run(config, *args, **kwargs) -> None:
    from sglang_optimal.runtime.managers.guest_tp_worker import GuestTpModelWorker
    from sglang_optimal.runtime.managers.scheduler import run_mixed_scheduler_process
    from sglang_optimal.runtime.sampling.sampler import MixtureSampler
    from sglang_optimal.runtime.speculative.spec_worker import MixingSpecWorker

    student_forward = GuestTpModelWorker._forward
    sample = MixtureSampler.forward
    verify = MixingSpecWorker._verify_forward

    def forward_student(self, part):
        orders = [_order(req, "student") for req in part.reqs]
        if "raise" in orders:
            raise RuntimeError("injected: out of luck")
        output = student_forward(self, part)
        student = output.logits_output
        student.next_token_logits = _spoil(student.next_token_logits, orders)
        return output

    def forward(self, logits_output, sampling_info, *more, **keywords):
        step = getattr(sampling_info, "mixing", None)
        if step is not None:
            orders = [None] * len(logits_output.next_token_logits)
            for row, req in zip(step.rows.row_ids, step.rows.reqs, strict=True):
                orders[row] = _order(req, "teacher")
            logits_output.next_token_logits = _spoil(logits_output.next_token_logits, orders)
        return sample(self, logits_output, sampling_info, *more, **keywords)

    def verify_forward(self, batch, drafted, drafts):
        output = verify(self, batch, drafted, drafts)
        reqs = [*batch.reqs, *[batch.reqs[i] for i in drafted.row_ids] * len(drafts)]
        teacher = output.logits_output
        teacher.next_token_logits = _spoil(teacher.next_token_logits, [_order(req, "teacher") for req in reqs])
        return output

    GuestTpModelWorker._forward, MixtureSampler.forward = forward_student, forward
    MixingSpecWorker._verify_forward = verify_forward
    run_mixed_scheduler_process(config, *args, **kwargs)


def _order(req, side: str) -> str | None:
    parts = req.rid.split("-")
    if parts[0] == side and len(req.output_ids) >= int(parts[2]):
        return parts[1]
    return None


def _spoil(logits: torch.Tensor, orders: list[str | None]) -> torch.Tensor:
    if not any(orders):
        return logits
    logits = logits.clone()
    for row, order in enumerate(orders):
        if order == "nan":
            logits[row, 20] = torch.nan
        elif order == "inf":
            logits[row, 20] = torch.inf
        elif order == "masked":
            logits[row] = -torch.inf
    return logits
