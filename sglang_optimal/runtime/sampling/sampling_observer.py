"""The mixing of one step: from both models' logits to the sampled token's extras.

SGLang calls in this order: ``before_grammar`` (penalties, grammar mask and bias go to the guest's logits too), the
sampler (mixes, see sampler.py), ``after_sample`` (gathers what clients may ask for). The extras travel to the CPU with
the sampled tokens, in one asynchronous copy.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.managers.auxiliary_output import (
    CommittedTokens,
    CompositeHostAuxiliaryOutput,
    DeviceAuxiliaryOutput,
    HostAuxiliaryOutput,
    append_auxiliary_output,
)
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_optimal.mixing import SamplingFilters, Sides
from sglang_optimal.names import SERIES, TOP_K
from sglang_optimal.runtime.managers.dead_ends import NOTHING_LEFT, end_request
from sglang_optimal.runtime.sampling.sampler import MixingStep, behaviour_logprobs, token_values
from sglang_optimal.top_k import TopK
from sglang_optimal.wanted import Wanted

logger = logging.getLogger(__name__)

_KL_STUDENT, _KL_TEACHER = SERIES.index("kl_to_student"), SERIES.index("kl_to_teacher")


class MixingObserver:
    """SGLang's SamplingObserver for batches with mixed rows.

    Attributes:
        on_tokens: told the values of every sampled token.
        on_sides: told the requests and both sides' logits [n, V] that a token of each is sampled from; only while the
            self-check runs.
        equal_sides: notices sides that are the same although they should not be.
    """

    on_tokens: Callable[[list[list[float]]], None] | None = None
    on_sides: Callable[[list[Req], torch.Tensor, torch.Tensor], None] | None = None

    def __init__(self) -> None:
        self.equal_sides = EqualSides()

    def is_active(self, sampling_info: SamplingBatchInfo) -> bool:
        return getattr(sampling_info, "mixing", None) is not None

    def before_grammar(self, logits: torch.Tensor, sampling_info: SamplingBatchInfo) -> MixingStep:
        sampling_info.mixing.apply_logit_transforms(logits.shape[-1], sampling_info)
        return sampling_info.mixing

    def after_sample(self, state: MixingStep, token_ids: torch.Tensor) -> DeviceAuxiliaryOutput:
        mixed = state.take_mixed()
        token_ids = state.rows.select(token_ids).long()
        sides, filters = Sides(mixed.mixture, mixed.teacher, mixed.student, mixed.temperature), mixed.filters
        behaviour = None
        if filters is not None:
            behaviour = functools.partial(_drawn, sides, filters, token_ids)
        values = token_values(sides, token_ids, state.rows.wanted, behaviour).unsqueeze(1)
        if self.on_sides is not None:
            self.on_sides(state.rows.reqs, mixed.teacher, mixed.student)
        output = MixingDeviceOutput(state.rows.row_ids, values, state.rows.wanted, self, state.failure, state)
        return append_auxiliary_output(output, state.dead_rows)


def _drawn(sides: Sides, filters: SamplingFilters, ids: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [n] that tokens were drawn with; of a greedy one 0, whichever of equals it was."""
    return behaviour_logprobs(sides.mixture_logits(), filters, ids).masked_fill_(filters.top_k <= 1, 0.0)


class EqualSides:
    """Counts tokens of which both sides gave exactly the same distribution although they read different contexts.

    That many in a row come of a fault, not of two models that agree: of logits that are one model's twice.

    Attributes:
        tokens: how many there were.
    """

    _MANY, _SHARE = 512, 0.95

    def __init__(self) -> None:
        self.tokens = 0
        self._seen = 0
        self._warned = False

    def add(self, req: Req, values: Sequence[float]) -> None:
        """Count one token, by its values of ``SERIES``."""
        if req.mixing.guest.prompt_ids == req.origin_input_ids:
            return
        self._seen += 1
        self.tokens += values[_KL_STUDENT] == 0.0 == values[_KL_TEACHER]
        if not self._warned and self._seen >= self._MANY and self.tokens >= self._SHARE * self._seen:
            self._warned = True
            logger.warning(
                "%d of %d mixed tokens had the same distribution on both sides although the contexts differ: the "
                "mixture may be one model alone. Start again with --mixing-self-check on, or --disable-cuda-graph.",
                self.tokens,
                self._seen,
            )


@dataclasses.dataclass
class MixingDeviceOutput:
    """Extras on the device: ``values`` [n, w, …] (`token_values`) of up to w tokens for each of the batch's
    rows ``row_ids``."""

    row_ids: list[int]
    values: torch.Tensor
    wanted: Wanted
    observer: MixingObserver
    failure: str | None = None
    step: MixingStep | None = None  # what is scored of it comes after its sampling

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> HostAuxiliaryOutput:
        output = MixingHostOutput(self.row_ids, copy_tensor(self.values), self.wanted, self.observer, self.failure)
        scoring = None if self.step is None else self.step.scoring
        if scoring is None:
            return output
        return CompositeHostAuxiliaryOutput((output, scoring.copy_to_host(copy_tensor)))


@dataclasses.dataclass
class MixingHostOutput:
    """Extras on the CPU; handed to each request together with the tokens they belong to."""

    row_ids: list[int]
    values: torch.Tensor
    wanted: Wanted
    observer: MixingObserver
    failure: str | None = None

    def consume(self, batch: ScheduleBatch, commits: Sequence[CommittedTokens | None]) -> None:
        sampled = []
        columns = len(self.wanted.columns)
        series, most_likely = self.values[..., :columns].tolist(), None
        if self.wanted.top_k:
            most_likely = self.values[..., columns:].unflatten(-1, (-1, 4, self.wanted.top_k)).numpy()
        for i, row in enumerate(self.row_ids):
            commit = commits[row]
            if commit is None:  # chunk in flight, or a request that had already finished
                continue
            # Fewer than were sampled where a stop condition ended the request among them.
            count = len(commit.token_ids)
            kept = self._take(batch.reqs[row], commit.output_index, series[i][:count])
            sampled += kept
            if most_likely is not None:
                self._take_top_k(batch.reqs[row], most_likely[i, : len(kept)])
        if sampled and self.observer.on_tokens is not None:
            self.observer.on_tokens(sampled)

    def _take(self, req: Any, start: int, tokens: list[list[float]]) -> list[list[float]]:
        """Add the values of a request's tokens from position ``start`` on; returns those it keeps."""
        names = req.mixing.wanted.names
        places = [self.wanted.columns.index(name) for name in names]
        for position, values in enumerate(tokens):
            problem = self._problem(values)
            if problem is not None:
                end_request(req, start + position, problem)
                return tokens[:position]
            if req.customized_info is None:
                req.customized_info = {}
            if req.mixing.score is not None:  # the token beyond a completion, which nobody asked for
                return []
            self.observer.equal_sides.add(req, values)
            for name, place in zip(names, places, strict=True):
                req.customized_info.setdefault(name, []).append(values[place])
        return tokens

    def _take_top_k(self, req: Any, tokens: np.ndarray) -> None:
        """Add the most likely tokens [tokens, sides of the batch, 4, k of the batch] that the request asked for."""
        wanted = req.mixing.wanted
        if wanted.top_k:
            sides = [self.wanted.sides.index(side) for side in wanted.sides]
            entries = [TopK(wanted.sides, wanted.top_k_format, token[sides, :, : wanted.top_k]) for token in tokens]
            req.customized_info.setdefault(TOP_K, []).extend(entries)

    def _problem(self, values: list[float]) -> str | None:
        """Why there is no mixture that this token could have come from; None when there is."""
        alpha, teacher, student, _, kl_to_student, kl_to_teacher = values[:6]
        if math.isfinite(alpha) and math.isfinite(kl_to_student) and math.isfinite(kl_to_teacher):
            return None
        if self.failure is not None:
            return self.failure
        if math.isinf(kl_to_student):
            return f"{NOTHING_LEFT}: the models, grammar, logit_bias and min_new_tokens together mask them all."
        for side, logprob in (("student", student), ("teacher", teacher)):  # NaN of the student spreads to both
            if math.isnan(logprob):
                return f"the {side}'s logits are not finite: NaN or infinity in its weights or its numbers."
        return "the mixture is not finite; fixed_alpha may be too large."
