"""What a speculative step drafts, and what it hands to SGLang when it is done."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.auxiliary_output import DeviceAuxiliaryOutput, append_auxiliary_output
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult

from sglang_optimal.mixing.filters import SamplingFilters
from sglang_optimal.mixing.speculation import draw
from sglang_optimal.runtime.core import DraftRows
from sglang_optimal.runtime.sampling.sampling_observer import MixingDeviceOutput, MixingObserver


@dataclasses.dataclass
class Draft:
    """What the guest drafted for n rows.

    Attributes:
        token_ids: [k, n] int64. logits: [k+1, n, v] float32, the guest's at each position, bias added.
        probs: [k, n, v] float32, what the tokens were drawn from; None where all rows are greedy.
        lockstep_logits: [m, V_guest], its logits at the first position for all m mixed rows; None where n = m.
        failure: why there is nothing; else None.
    """

    token_ids: torch.Tensor
    logits: torch.Tensor
    probs: torch.Tensor | None
    lockstep_logits: torch.Tensor | None = None
    failure: str | None = None

    @classmethod
    def empty(cls, k: int, n: int, v: int, device, *, greedy: bool) -> Draft:
        return cls(
            token_ids=torch.zeros((k, n), dtype=torch.int64, device=device),
            logits=torch.empty((k + 1, n, v), device=device),
            probs=None if greedy else torch.empty((k, n, v), device=device),
        )

    def propose(self, position: int, filters: SamplingFilters) -> torch.Tensor:
        """Tokens [n] drawn from the guest's logits at ``position`` with ``filters``."""
        logits = self.logits[position]
        if self.probs is None:
            return logits.argmax(-1)
        probs = filters.probs(logits.nan_to_num(0.0, 0.0) if _not_finite(logits) else logits)
        self.probs[position] = probs
        return draw(probs)

    def fill_invalid(self, mixed: int) -> None:
        """Leave nothing that could be taken for a distribution, after a failure; ``mixed``: number of mixed rows."""
        self.token_ids.zero_()
        self.logits.fill_(torch.nan)
        if self.probs is not None:
            self.probs.fill_(1.0 / self.probs.shape[-1])
        self.lockstep_logits = torch.full((mixed, self.logits.shape[-1]), torch.nan, device=self.logits.device)


@dataclasses.dataclass
class VerifyOutput:
    """What the mixture made of a draft.

    Attributes:
        rows: which rows of the batch.
        token_ids: [w, n] int64, num_accepted: [n] int64; the first ``num_accepted`` + 1 tokens of a row count.
        values: [w, n, …] float32, see `token_values`.
        logits: [w, n, v], the mixture's.
    """

    rows: DraftRows
    token_ids: torch.Tensor
    num_accepted: torch.Tensor
    values: torch.Tensor
    logits: torch.Tensor

    def show(self, on_sides, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Tell ``MixingObserver.on_sides`` of both sides' logits [w, n, v] where a token came of them."""
        # Where mixed rows go on in lockstep beside them, it has been told of all first positions.
        for ahead in range(0 if self.rows.drafted_in_mixed is None else 1, len(self.token_ids)):
            rows = (self.num_accepted >= ahead).nonzero().view(-1)
            reqs = [self.rows.drafted.reqs[i] for i in rows.tolist()]
            on_sides(reqs, teacher[ahead][rows], student[ahead][rows])

    def result(
        self,
        batch: ScheduleBatch,
        lockstep: tuple[torch.Tensor, LogitsProcessorOutput] | None,
        observer: MixingObserver,
        failure: str | None,
    ) -> GenerationBatchResult:
        """SGLang's result of a speculative step, w tokens wide.

        Args:
            lockstep: tokens [B] and output of the requests that were not drafted for; None when all were.
        """
        width, size = len(self.token_ids), len(batch.reqs)
        rows = self.rows.drafted
        others: list[DeviceAuxiliaryOutput] = []
        tokens, lens, values = self.token_ids.T, self.num_accepted + 1, self.values.transpose(0, 1)
        if lockstep is not None:
            lockstep_token_ids, lockstep_output = lockstep
            of_mixing, others = _parts(lockstep_output.auxiliary_device_output)
            drafted_token_ids = tokens
            tokens = tokens.new_zeros((size, width))
            tokens[:, 0] = lockstep_token_ids
            rows.put(tokens, drafted_token_ids)
            lens = rows.put(lens.new_ones(size), lens)
            rows = self.rows.mixed
            if self.rows.drafted_in_mixed is not None:
                lockstep_values, drafted_values = of_mixing[0].values, values
                values = lockstep_values.new_zeros((len(rows.row_ids), width, lockstep_values.shape[-1]))
                values[:, :1] = lockstep_values
                values[self.rows.drafted_in_mixed] = drafted_values
        output = LogitsProcessorOutput(next_token_logits=None)
        if batch.return_logprob:
            self._write_logprobs(output, batch, None if lockstep is None else lockstep[1])
        extras: DeviceAuxiliaryOutput | None = MixingDeviceOutput(
            rows.row_ids, values, self.rows.mixed.wanted, observer, failure
        )
        for other in others:
            extras = append_auxiliary_output(extras, other)
        output.auxiliary_device_output = extras
        return GenerationBatchResult(
            logits_output=output,
            next_token_ids=tokens.reshape(-1).to(torch.int32),
            accept_lens=lens.to(torch.int32),
            speculative_num_draft_tokens=width,
        )

    def _write_logprobs(
        self, output: LogitsProcessorOutput, batch: ScheduleBatch, lockstep: LogitsProcessorOutput | None
    ) -> None:
        """The log-probabilities that requests asked for, w for each, by SGLang's own functions."""
        width, n, v = self.logits.shape
        rows, info = self.rows.drafted, batch.sampling_info
        part = SimpleNamespace(
            seq_lens=rows.row_ids,
            sampling_info=SimpleNamespace(
                is_all_greedy=info.is_all_greedy, temperatures=rows.select(info.temperatures)
            ),
            top_logprobs_nums=[batch.top_logprobs_nums[i] for i in rows.row_ids],
            token_ids_logprobs=[batch.token_ids_logprobs[i] for i in rows.row_ids],
        )
        own = LogitsProcessorOutput(next_token_logits=self.logits.transpose(0, 1).reshape(n * width, v))
        compute_spec_logprobs(part, own, self.token_ids.T.reshape(-1), chain_stride=width)
        if lockstep is None:
            for name in _LOGPROB_LISTS:
                setattr(output, name, getattr(own, name))
            output.next_token_logprobs = own.next_token_logprobs
            return
        size = len(batch.reqs)
        logprobs = own.next_token_logprobs.new_zeros((size, width))
        logprobs[:, 0] = lockstep.next_token_logprobs
        rows.put(logprobs, own.next_token_logprobs)
        output.next_token_logprobs = logprobs
        nothing = logprobs.new_empty(0)
        for name in _LOGPROB_LISTS:
            mine, theirs = getattr(own, name), getattr(lockstep, name)
            if mine is None and theirs is None:
                continue
            merged: list = [nothing] * (size * width)
            if theirs is not None:
                merged[::width] = theirs
            for position, row in enumerate(rows.row_ids):
                if mine is not None:
                    merged[row * width : (row + 1) * width] = mine[position * width : (position + 1) * width]
            setattr(output, name, merged)


_LOGPROB_LISTS = (
    "next_token_top_logprobs_val",
    "next_token_top_logprobs_idx",
    "next_token_token_ids_logprobs_val",
    "next_token_token_ids_logprobs_idx",
)


def _parts(extras: DeviceAuxiliaryOutput | None) -> tuple[list[MixingDeviceOutput], list[DeviceAuxiliaryOutput]]:
    """The extras of a lockstep sampling: of its mixed rows, and others."""
    parts = [] if extras is None else getattr(extras, "outputs", (extras,))
    mixing = [part for part in parts if isinstance(part, MixingDeviceOutput)]
    return mixing, [part for part in parts if not isinstance(part, MixingDeviceOutput)]


def _not_finite(logits: torch.Tensor) -> bool:
    """Whether to look after NaN; a device is not asked, which would wait for it."""
    return logits.device.type != "cpu" or bool(logits.isnan().any())
