"""The sampling backend ``optimal``: SGLang's own sampler, run on the mixture's logits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.auxiliary_output import DeviceAuxiliaryOutput
from sglang.srt.runtime_context import get_context, get_exec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_optimal.mixing import (
    Mixture,
    SamplingFilters,
    Sides,
    compile_kernels,
    mix,
    more_series,
    token_logprobs,
    top_k,
)
from sglang_optimal.runtime.core import MixedRows
from sglang_optimal.runtime.managers.dead_ends import DeadRows, unmask_dead_rows
from sglang_optimal.runtime.sampling.filters import filters_of
from sglang_optimal.runtime.sampling.support import Support
from sglang_optimal.wanted import Wanted

BACKEND = "optimal"
BEHAVIOUR = "behaviour_logprob"


@dataclasses.dataclass
class MixedLogits:
    """What was mixed at one position of n rows, and what came of it.

    Attributes:
        teacher, student: [n, V] logits, transformed. temperature: [n, 1].
        mixture: of both.
        filters: what of the mixture may be drawn; None where nobody asked with what probability it was.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    temperature: torch.Tensor
    mixture: Mixture
    filters: SamplingFilters | None = None


@dataclasses.dataclass
class MixingStep:
    """One batch's mixed rows on their way through SGLang's sampling.

    Attributes:
        rows: which rows of the batch, and their settings.
        guest_logits: [n, V_guest], once the guest's forward was launched and until they are mixed.
        support: the ids that the mixture lives on.
        mixed: once they are mixed, and until the token is sampled.
        failure: why there are no guest logits (they are NaN then, and the rows end with this message); else None.
        dead_rows: of the whole batch, where a request changes logits.
        scoring: the scores of given completions; set once the forward has been launched.
    """

    rows: MixedRows
    guest_logits: torch.Tensor | None
    support: Support
    mixed: MixedLogits | None = None
    failure: str | None = None
    dead_rows: DeadRows | None = None
    scoring: DeviceAuxiliaryOutput | None = None

    def apply_logit_transforms(self, width: int, info: SamplingBatchInfo) -> None:
        """Penalties, grammar mask and logit bias, applied to the guest's logits as SGLang does to the host's."""
        if not _are_transformed(info):
            return
        logits = self._guest_logits().float()
        # SGLang's transforms take the whole batch at the host's width.
        full = logits.new_zeros((len(info), width))
        size = self.support.size
        self.rows.put(full[:, :size], logits[:, :size])
        info.apply_logits_bias(full)
        self.guest_logits = self.rows.select(full)

    def mix_into(self, logits: torch.Tensor, info: SamplingBatchInfo) -> torch.Tensor:
        """Replace the mixed rows of the host's ``logits`` [B, V] by the mixture's; returns what to sample from.

        The host's own rows are kept for the logprobs of the sampled token.
        """
        support, width = self.support, logits.shape[-1]
        guest, self.guest_logits = support.cut(self._guest_logits()), None
        teacher, student = self.rows.by_role(support.cut(self.rows.select(logits)), guest)
        temperature = self.rows.select(info.temperatures)
        mixed = torch.empty((len(teacher), width), dtype=torch.float32, device=logits.device)
        wanted = self.rows.wanted
        ess_ratio = "ess_ratio" in wanted.series
        mixture = mix(teacher, student, temperature, self.rows.alpha, ess_ratio=ess_ratio, out=mixed[:, : support.size])
        filters = filters_of(info, self.rows) if BEHAVIOUR in wanted.series else None
        self.mixed = MixedLogits(teacher, student, temperature, mixture, filters)
        make_samplable(mixed, mixture)
        support.exclude(mixed)
        if self.rows.device_row_ids is None:
            return mixed.to(logits.dtype)
        return self.rows.put(logits, mixed.to(logits.dtype))

    def take_mixed(self) -> MixedLogits:
        """What was mixed, which the step then lets go: it lives on with the batch for two more iterations.

        Raises:
            RuntimeError: nothing was.
        """
        mixed, self.mixed = self.mixed, None
        if mixed is None:
            raise RuntimeError("the logits of the step were not mixed")
        return mixed

    def _guest_logits(self) -> torch.Tensor:
        if self.guest_logits is None:
            raise RuntimeError("the guest's forward of the step was not launched")
        return self.guest_logits


def token_values(
    sides: Sides, ids: torch.Tensor, wanted: Wanted, behaviour: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """All that leaves the device with one token of each row.

    Args:
        sides: n rows. ids: [n] int64, the tokens.
        behaviour: gives the log-probabilities [n] that they were drawn with; for that series.

    Returns:
        [n, C + 4·S·k] float32: the series ``wanted.columns``, then for each of ``wanted.sides`` the rows of
        `sglang_optimal.mixing.top_k`.
    """
    m = sides.mixture
    teacher, student, mixture = token_logprobs(m, sides.teacher_logits, sides.student_logits, sides.temperature, ids)
    ess = m.ess_ratio if m.ess_ratio is not None else torch.full_like(m.alpha, torch.nan)
    values = torch.stack([m.alpha, teacher, student, mixture, m.kl_to_student, m.kl_to_teacher, ess], dim=-1)
    names = wanted.more_series
    if not names and not wanted.top_k:
        return values
    parts = [values, more_series([name for name in names if name != BEHAVIOUR], sides, ids)]
    if BEHAVIOUR in names:  # the last of all series
        if behaviour is None:
            raise RuntimeError("it is not known how the tokens were drawn")
        parts.append(behaviour().unsqueeze(-1))
    parts += [top_k(side, wanted.top_k, sides).flatten(1) for side in wanted.sides]
    return torch.cat(parts, dim=-1)


def behaviour_logprobs(mixture_logits: torch.Tensor, filters: SamplingFilters, ids: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [n] that tokens have to be drawn: of the mixture, after temperature and the filters."""
    return filters.probs(mixture_logits).gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()


def make_samplable(mixed: torch.Tensor, mixture: Mixture) -> None:
    """Give finite logits [n, V] to rows that no mixture came of, in place.

    Sampling from NaN would end the whole process. The statistics stay as they are, which ends the request.
    """
    bad = ~(mixture.alpha + mixture.kl_to_student + mixture.kl_to_teacher).isfinite()
    # The look is free on a CPU; elsewhere it would wait for the device, which the pass does not.
    if mixed.device.type != "cpu" or bool(bad.any()):
        mixed.masked_fill_(bad.unsqueeze(-1), 0.0)


def _are_transformed(info: SamplingBatchInfo) -> bool:
    """Whether a request of the batch changes logits: by penalties, ``min_new_tokens`` among them, a grammar or bias."""
    penalized = info.penalizer_orchestrator is not None and info.penalizer_orchestrator.is_required
    return (
        penalized
        or info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
        or bool(info.grammars)
        or info.logit_bias is not None
    )


class MixtureSampler(Sampler):
    """Replaces the mixed rows' logits by ``T·log q*`` (up to a constant), then samples as SGLang does.

    Temperature, top-k, top-p, min-p, seeds and returned logprobs therefore mean on the mixture what they mean in SGLang
    on one model. Batches without mixed rows go straight through.
    """

    def forward(self, logits_output, sampling_info: SamplingBatchInfo, *args, **kwargs) -> torch.Tensor:
        """Mix the rows that are mixed, then sample as SGLang does."""
        step = getattr(sampling_info, "mixing", None)
        if step is not None:
            logits_output.next_token_logits = step.mix_into(logits_output.next_token_logits, sampling_info)
        if _are_transformed(sampling_info):
            dead_rows = unmask_dead_rows(logits_output.next_token_logits)
            if step is None:
                logits_output.auxiliary_device_output = dead_rows
            else:  # the observer makes the output, of both
                step.dead_rows = dead_rows
        return super().forward(logits_output, sampling_info, *args, **kwargs)


def create_mixture_sampler() -> MixtureSampler:
    """Factory of ``--sampling-backend optimal``; called by each model runner.

    Raises:
        RuntimeError: SGLang's own scheduler asked for it, which has no guest and would sample the host alone.
    """
    if not _has_guest.get():
        raise RuntimeError(
            "--sampling-backend optimal needs a student: start the server with python -m sglang_optimal.launch_server."
        )
    if get_exec().kernel.sampling_backend == BACKEND:
        # SGLang's sampler picks its top-k/top-p kernels by this name; the record of launch arguments keeps "optimal".
        get_context().override("sglang_optimal.sampler", sampling_backend=_kernel_backend())
    return MixtureSampler()


def install(model_runner) -> None:
    """Make a model runner sample mixtures. SGLang replaces the backend's name on CPU and in deterministic mode."""
    if not isinstance(model_runner.sampler, MixtureSampler):
        model_runner.sampler = create_mixture_sampler()
    compile_kernels(model_runner.device, model_runner.model_config.vocab_size)


_has_guest: ContextVar[bool] = ContextVar("sglang_optimal.has_guest", default=False)


@contextlib.contextmanager
def beside_a_guest() -> Iterator[None]:
    """Build the model runners of a worker with a guest within; no other may have a `MixtureSampler`."""
    token = _has_guest.set(True)
    try:
        yield
    finally:
        _has_guest.reset(token)


def _kernel_backend() -> str:
    if not torch.cuda.is_available() or get_exec().deterministic.enable_deterministic_inference:
        return "pytorch"
    from sglang.srt.utils.common import is_flashinfer_available

    return "flashinfer" if is_flashinfer_available() else "pytorch"
