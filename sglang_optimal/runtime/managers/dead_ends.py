"""Requests that leave themselves no token to sample: a grammar that no token of the vocabulary goes on with, or that is
at its end while ``min_new_tokens`` asks for more, or stops that are the whole vocabulary while it does. SGLang calls it
an internal error, or ends with it; the fields are the client's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.managers.auxiliary_output import CommittedTokens
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

logger = logging.getLogger(__name__)

NOTHING_LEFT = "no token is left to sample"
_OF_SGLANG = "Grammar accept_token failed"
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
_MASKS = (*_GRAMMARS, "logit_bias", "min_new_tokens")


def blame_request(finish_reason: dict[str, Any], params: Any) -> None:
    """Make the end of such a request an HTTP 400 that names its fields; other ends stay as they are.

    Args:
        finish_reason: of the request's last output; changed.
        params: the request's sampling parameters, as they came.
    """
    message = finish_reason.get("message") or ""
    if finish_reason.get("type") != "abort" or not message.startswith((NOTHING_LEFT, _OF_SGLANG)):
        return
    given = [name for name in _MASKS if isinstance(params, dict) and params.get(name)]
    if not given:
        return
    finish_reason["status_code"] = HTTPStatus.BAD_REQUEST
    finish_reason["err_type"] = "BadRequestError"
    finish_reason["message"] = (
        f"{', '.join(given)}: {NOTHING_LEFT}: the grammar allows none that the vocabulary has here, or ends before "
        "min_new_tokens, or logit_bias forbids all."
    )


def unmask_dead_rows(logits: torch.Tensor) -> DeadRows:
    """Let rows [B, V] without any allowed token be sampled, in place; sampling them would end the whole process.

    What is drawn from them is any token: one that ends the request in order, or its last, as well. So the rows are
    told to the CPU, which ends them.
    """
    dead = logits.amax(-1) == -torch.inf
    logits.masked_fill_(dead.unsqueeze(-1), 0.0)
    return DeadRows(dead)


@dataclasses.dataclass
class DeadRows:
    """Which rows of a batch had no token to sample, [B] bool; an auxiliary output of SGLang's, on device and CPU."""

    dead: torch.Tensor

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> DeadRows:
        return DeadRows(copy_tensor(self.dead))

    def consume(self, batch: ScheduleBatch, commits: Sequence[CommittedTokens | None]) -> None:
        if not self.dead.any():
            return
        for req, commit, dead in zip(batch.reqs, commits, self.dead.tolist(), strict=False):  # beams' rows come after
            if dead and commit is not None:
                end_request(req, commit.output_index, f"{NOTHING_LEFT}: grammar, logit_bias and min_new_tokens.")


def end_request(req: Req, length: int, problem: str) -> None:
    """End a request with an error (HTTP 500) and ``length`` tokens; what it decoded does not enter the radix caches."""
    logger.error("request %r: %s", req.rid, problem)
    reason = FINISH_ABORT(problem, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
    if req.finished():
        req.finished_reason = reason
    else:
        req.to_finish = reason
    req.finished_len = length
    req.skip_radix_cache_insert = True
