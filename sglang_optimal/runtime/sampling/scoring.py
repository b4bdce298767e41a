"""Scoring: what both models, and their mixture, say of a completion that is given.

Both contexts are prefilled with the completion behind them, and the hidden states of its positions are kept. Once both
sides have them, each model's head turns them into logits, a few positions at a time, which are mixed as those of a
decode step are. One token is sampled beyond the completion, as of any prefill, and dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsMetadata
from sglang.srt.managers.auxiliary_output import CommittedTokens
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from sglang_optimal.mixing import SamplingFilters, Sides, mix
from sglang_optimal.runtime.core import MixedRows, PrefillChunk, Score, alpha_params
from sglang_optimal.runtime.managers.dead_ends import end_request
from sglang_optimal.runtime.model_executor.host_copy import sent
from sglang_optimal.runtime.sampling.filters import kernels_for
from sglang_optimal.runtime.sampling.sampler import BEHAVIOUR, behaviour_logprobs, token_values
from sglang_optimal.runtime.sampling.support import Support
from sglang_optimal.scores import SCORED, ScoredTokens

# Elements of one model's logits at a time; a few such tensors are alive together.
_BLOCK_ELEMENTS = 1 << 24


def score_of(req: Req) -> Score | None:
    """The scoring of a request; None for one that generates."""
    mixing = getattr(req, "mixing", None)
    return None if mixing is None else mixing.score


def want_hidden_states(batch: ScheduleBatch, reqs: Sequence[Req]) -> None:
    """Let the forward of ``batch`` keep the hidden states of all its tokens where one of ``reqs`` is scored."""
    if any(score_of(req) is not None for req in reqs):
        batch.return_hidden_states_mode = CaptureHiddenMode.FULL


def take_host_states(batch: ScheduleBatch, hidden: torch.Tensor | None) -> None:
    """Keep the scored positions of a prefill's ``hidden`` states [tokens, H]."""
    if hidden is None:
        return
    begin = 0
    for req, start, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        score = score_of(req)
        if score is not None:
            end = len(req.origin_input_ids) - 1
            _take(score.host, hidden[begin : begin + length], start, end - score.length, end)
        begin += length


def take_guest_states(chunks: Sequence[PrefillChunk], hidden: torch.Tensor | None) -> None:
    """The same of one forward of the guest's prompts."""
    if hidden is None:
        return
    begin = 0
    for chunk in chunks:
        length = chunk.end - chunk.start
        score = score_of(chunk.req)
        if score is not None:
            end = len(chunk.req.mixing.guest.prompt_ids) - 1
            _take(score.guest, hidden[begin : begin + length], chunk.start, end - score.length, end)
        begin += length


def _take(parts: list[torch.Tensor], hidden: torch.Tensor, start: int, first: int, end: int) -> None:
    """Add the positions in [first, end) of ``hidden``, whose first one is ``start``; the first of all begins anew."""
    low, high = max(first, start), min(end, start + len(hidden))
    if low >= high:
        return
    if low == first:  # also of a request that was prefilled before, and taken back
        parts.clear()
    parts.append(hidden[low - start : high - start].clone())


@dataclasses.dataclass
class Scoring:
    """What was scored in one step, on the device or the CPU; an auxiliary output of SGLang's.

    Attributes:
        rows: of the batch. values: [L, …] of each (`token_values`). error: why there are none.
    """

    rows: list[int] = dataclasses.field(default_factory=list)
    values: list[torch.Tensor] = dataclasses.field(default_factory=list)
    errors: dict[int, str] = dataclasses.field(default_factory=dict)

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Scoring:
        return Scoring(self.rows, [copy_tensor(values) for values in self.values], self.errors)

    def consume(self, batch: ScheduleBatch, commits: Sequence[CommittedTokens | None]) -> None:
        for row, message in self.errors.items():
            if commits[row] is not None:
                end_request(batch.reqs[row], 0, message)
        for row, values in zip(self.rows, self.values, strict=True):
            if commits[row] is not None:
                _hand_out(batch.reqs[row], values.numpy())


def _hand_out(req: Req, values: np.ndarray) -> None:
    """The scores of a request, with the one token that it has."""
    wanted = req.mixing.wanted
    checked = [wanted.columns.index(name) for name in ("alpha", "kl_to_student", "kl_to_teacher")]
    if not np.isfinite(values[:, checked]).all():
        end_request(req, 0, "the models' logits or their mixture are not finite at a position of the completion.")
        return
    if req.customized_info is None:
        req.customized_info = {}
    req.customized_info[SCORED] = [ScoredTokens(wanted, list(req.origin_input_ids[-len(values) :]), values)]


def score(rows: MixedRows, host: ModelRunner, guest: ModelRunner, support: Support) -> Scoring:
    """Score the completions of the rows whose prompts are complete.

    Args:
        host, guest: whose heads to use; one where both sides are one model.
        support: the ids that the mixture lives on.
    """
    result = Scoring()
    for row, req in zip(rows.row_ids, rows.reqs, strict=True):
        given = score_of(req)
        if given is None:
            continue
        try:
            values = _score_one(req, given, host, guest, support)
        except Exception as error:  # the request's own; others of the batch go on
            result.errors[row] = f"scoring failed: {type(error).__name__}: {error}"
            continue
        finally:
            given.host.clear()
            given.guest.clear()
        result.rows.append(row)
        result.values.append(values)
    return result


def _score_one(req: Req, given: Score, host: ModelRunner, guest: ModelRunner, support: Support) -> torch.Tensor:
    states = torch.cat(given.host), torch.cat(given.guest)
    if not len(states[0]) == len(states[1]) == given.length:
        raise RuntimeError(f"{len(states[0])} and {len(states[1])} hidden states of {given.length} positions")
    device = states[0].device
    ids = sent(list(req.origin_input_ids[-given.length :]), device)[1]
    params, wanted = req.sampling_params, req.mixing.wanted
    v = support.size
    bias = _bias(params.logit_bias, v, device)
    size = max(1, _BLOCK_ELEMENTS // v)
    done = []
    for i in range(0, given.length, size):
        block = slice(i, i + size)
        logits = (support.cut(head(runner, own[block])) for runner, own in zip((host, guest), states, strict=True))
        t, s = req.mixing.by_role(*logits)
        if bias is not None:
            t, s = t.float() + bias, s.float() + bias
        temperature = torch.full((len(t),), params.temperature, device=device)
        alpha = alpha_params([req.mixing.alpha] * len(t), device)
        mixture = mix(t, s, temperature, alpha, ess_ratio="ess_ratio" in wanted.series)
        behaviour = None
        if BEHAVIOUR in wanted.series:
            filters = _filters(params, temperature)
            behaviour = functools.partial(behaviour_logprobs, mixture.logits, filters, ids[block])
        done.append(token_values(Sides(mixture, t, s, temperature), ids[block], wanted, behaviour))
    return torch.cat(done)


def head(runner: ModelRunner, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] of a model's last hidden states [n, H], as its forward makes them.

    Raises:
        AttributeError: a model whose head is elsewhere.
    """
    model = runner.model
    # The buffer of graphs' logits is not this one's to write.
    metadata = LogitsMetadata(forward_mode=ForwardMode.DECODE)
    return model.logits_processor._get_logits(hidden, model.lm_head, metadata, use_logits_buffer=False)


def _bias(logit_bias: dict[str, float] | None, v: int, device: torch.device) -> torch.Tensor | None:
    if not logit_bias:
        return None
    bias = torch.zeros(v)
    for token, value in logit_bias.items():
        if int(token) < v:
            bias[int(token)] = value
    return bias.to(device)


def _filters(params: Any, temperature: torch.Tensor) -> SamplingFilters:
    rows = torch.ones_like(temperature)
    limits = SimpleNamespace(
        need_top_k_sampling=params.top_k != TOP_K_ALL,
        need_top_p_sampling=params.top_p != 1.0,
        need_min_p_sampling=params.min_p > 0,
    )
    greedy = params.top_k <= 1
    return SamplingFilters(
        temperature=temperature,
        top_k=rows.to(torch.int64) * params.top_k,
        top_p=rows * params.top_p,
        min_p=rows * params.min_p,
        needed=any(vars(limits).values()),
        greedy=greedy,
        some_greedy=greedy,
        largest_top_k=params.top_k,
        kernels=kernels_for(limits),
    )
