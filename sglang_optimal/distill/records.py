"""One record: a sample, what both models read, what they thought of every token, and how it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from sglang_optimal.distill.surprise import RARE, least_logprob, tokens_below
from sglang_optimal.distill.tables import written_json
from sglang_optimal.names import SERIES, SIDES, TOP_K
from sglang_optimal.top_k import ARRAYS, decode_top_k, encoded, top_k_column, top_k_columns

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

Context = str | list[dict[str, str]]
"""Plain text, or the messages of a chat."""


class NotStored(ValueError):
    """A filter reads of a record that was read again what its run did not store.

    Attributes:
        name: of it.
        filter: the filter's label, where it is known.
    """

    def __init__(self, name: str):
        super().__init__(f"{name} was not stored")
        self.name = name
        self.filter: str | None = None


@dataclasses.dataclass
class Record:
    """One sample of a run.

    Attributes:
        id: ``problem_id/strategy/sample_index``, of an escalation ``…/step``; unique in a run and the same whenever the
            run is repeated.
        problem_id: the problem's own id, or a hash of its fields.
        strategy: name of the prefix strategy.
        sample_index: number of the sample among those of the problem (with ``select: cross``: of problem and strategy;
            of an escalation: at its step).
        step: of an escalation, from 1 on; None in other runs.
        fields: every field of the problem.
        teacher_context, student_context: what each side read, before chat templates.
        text, token_ids: the sample. finish_reason: ``stop`` or ``length``.
        alpha … ess_ratio: see `sglang_optimal.names.SERIES`; floats, log-probabilities and KLs in nats.
        more_series: the series that the run asked for by name, of `sglang_optimal.names.MORE_SERIES`; likewise.
        top_k: the most likely tokens of the sides that the run asked for, see `sglang_optimal.decode_top_k`. Without
            arrays where the request was refused.
        sampling: what the request asked for, alpha settings among it.
        seed: the request's ``sampling_seed``.
        teacher_prompt_tokens: tokens of the teacher's prompt.
        teacher_prompt_ids, student_prompt_ids: token ids that each model really read, chat template and all.
        latency: seconds from the request to its answer.
        answer_probability: the student's, of the expected answer where the text first writes it, in [0, 1]; None where
            that is not known, and then answer_unknown says why (it is not stored).
        models: ids, revision and versions of models and software, as the server named them.
        accepted: whether it passed all filters.
        rejected_by, reject_reason: the filter that refused it, and why.
    """

    id: str
    problem_id: str
    strategy: str
    sample_index: int
    fields: dict[str, Any]
    teacher_context: Context
    student_context: Context
    text: str
    token_ids: list[int]
    finish_reason: str
    alpha: list[float] = dataclasses.field(default_factory=list)
    teacher_logprob: list[float] = dataclasses.field(default_factory=list)
    student_logprob: list[float] = dataclasses.field(default_factory=list)
    mixture_logprob: list[float] = dataclasses.field(default_factory=list)
    kl_to_student: list[float] = dataclasses.field(default_factory=list)
    kl_to_teacher: list[float] = dataclasses.field(default_factory=list)
    ess_ratio: list[float] = dataclasses.field(default_factory=list)
    more_series: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    top_k: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    teacher_prompt_tokens: int = 0
    teacher_prompt_ids: list[int] = dataclasses.field(default_factory=list)
    student_prompt_ids: list[int] = dataclasses.field(default_factory=list)
    latency: float = 0.0
    answer_probability: float | None = None
    answer_unknown: str | None = None
    step: int | None = None
    models: dict[str, str | None] = dataclasses.field(default_factory=dict)
    accepted: bool = True
    rejected_by: str | None = None
    reject_reason: str | None = None

    def row(self, *, series: bool = True, packed: bool = False) -> dict[str, Any]:
        """The record as it is stored, see `schema`.

        Args:
            series: with the seven per-token lists, not alpha alone. Those that were asked for by name always come.
            packed: the most likely tokens in one value, as a server sends them, for `unpacked`. Written in digits
                they take more than ten times as long.
        """
        row: dict[str, Any] = {
            "id": self.id,
            "problem_id": self.problem_id,
            "strategy": self.strategy,
            "sample_index": self.sample_index,
            "step": self.step,
            "problem": _text(self.fields.get("problem")),
            "answer": _text(self.fields.get("answer")),
            "fields": _json(self.fields),
            **_context("student", self.student_context),
            **_context("teacher", self.teacher_context),
            "text": self.text,
            "token_ids": self.token_ids,
            "num_tokens": len(self.token_ids),
            "finish_reason": self.finish_reason,
        }
        for name in SERIES:
            keep = series or name == "alpha"
            row[name] = [stored_float(value) for value in getattr(self, name)] if keep else []
        row |= {
            "mean_alpha": _stored(mean(self.alpha)),
            "mean_teacher_logprob": _stored(mean(self.teacher_logprob)),
            "mean_student_logprob": _stored(mean(self.student_logprob)),
            "mean_mixture_logprob": _stored(mean(self.mixture_logprob)),
            "mean_kl_to_student": _stored(mean(self.kl_to_student)),
            "mean_kl_to_teacher": _stored(mean(self.kl_to_teacher)),
            "log_weight_student": _stored(_difference(self.student_logprob, self.mixture_logprob)),
            "log_weight_teacher": _stored(_difference(self.teacher_logprob, self.mixture_logprob)),
            **self.surprises(),
            "sampling": _json(self.sampling),
            "seed": self.seed,
            "teacher_prompt_tokens": self.teacher_prompt_tokens,
            "teacher_prompt_ids": self.teacher_prompt_ids,
            "student_prompt_ids": self.student_prompt_ids,
            "latency": round(self.latency, 4),
            **{name: self.models.get(name) for name in MODEL_COLUMNS},
            "accepted": self.accepted,
            "rejected_by": self.rejected_by,
            "reject_reason": self.reject_reason,
        }
        for name, values in self.more_series.items():
            row[name] = [_stored_as(name, value) for value in values]
        if packed and self.top_k:
            row[TOP_K] = {
                side: {name: encoded(name, array) for name, array in arrays.items()}
                for side, arrays in self.top_k.items()
            }
        elif self.top_k:
            row |= top_k_columns(self.top_k)
        return row

    def surprises(self) -> dict[str, Any]:
        """The values of `SURPRISE_COLUMNS`; None where they are not known."""
        known = len(self.student_logprob) == len(self.token_ids)
        least = least_logprob(self.student_logprob) if known else math.nan
        return {
            "min_student_logprob": _stored(least),
            "rare_tokens": tokens_below(self.student_logprob) if known else None,
            "answer_probability": self.answer_probability,
        }


class PartialRecord(Record):
    """A record without some of the seven series; reading one of those raises `NotStored`.

    Attributes:
        missing: their names.
    """

    missing: tuple[str, ...] = ()

    def __getattribute__(self, name: str) -> Any:
        if name in SERIES and name in object.__getattribute__(self, "missing"):
            raise NotStored(name)
        return object.__getattribute__(self, name)

    def row(self, *, series: bool = True, packed: bool = False) -> dict[str, Any]:
        """As `Record.row`; a series that is missing is empty, and what is taken of it null."""
        missing, self.missing = self.missing, ()
        try:
            return super().row(series=series, packed=packed)
        finally:
            self.missing = missing


def unpacked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `Record.row` with ``packed`` as one without."""
    top_k = row.pop(TOP_K, None)
    return row if top_k is None else row | top_k_columns(decode_top_k(top_k))


SURPRISE_COLUMNS = ("min_student_logprob", "rare_tokens", "answer_probability")
"""Columns of how much of a sample surprises the student, see `sglang_optimal.distill.surprise`."""

MODEL_COLUMNS = (
    "teacher_model",
    "teacher_revision",
    "teacher_weight_version",
    "student_model",
    "student_revision",
    "student_weight_version",
    "sglang_version",
    "sglang_optimal_version",
)

COLUMNS = {
    "id": "problem_id/strategy/sample_index, of an escalation also /step; unique in the run",
    "problem_id": "the problem's own id, or a hash of its fields",
    "strategy": "prefix strategy: how the teacher was told",
    "sample_index": "number of the sample",
    "step": "of an escalation: the step that it came at, from 1 on; null in other runs",
    "problem": "the field `problem`",
    "answer": "the field `answer`",
    "fields": "every field of the problem, as JSON",
    "student_messages": "what the student read, as chat messages; null for plain text",
    "student_text": "what the student read, as plain text; null for chats",
    "student_context_sha256": "hash of what the student read",
    "teacher_messages": "what the teacher read, as chat messages; null for plain text",
    "teacher_text": "what the teacher read, as plain text; null for chats",
    "teacher_context_sha256": "hash of what the teacher read",
    "text": "the sample",
    "token_ids": "its token ids",
    "num_tokens": "how many",
    "finish_reason": "stop, or length",
    "alpha": "per token: the teacher's weight",
    "teacher_logprob": "per token: log-probability under the teacher, nats",
    "student_logprob": "per token: log-probability under the student, nats",
    "mixture_logprob": "per token: log-probability under the mixture (before top-p and the like), nats",
    "kl_to_student": "per token: KL(mixture‖student), nats",
    "kl_to_teacher": "per token: KL(mixture‖teacher), nats",
    "ess_ratio": "per token: Σ p_teacher²/q over Σ p_student²/q",
    "mean_alpha": "mean over the tokens",
    "mean_teacher_logprob": "mean over the tokens",
    "mean_student_logprob": "mean over the tokens: how on-policy the sample is",
    "mean_mixture_logprob": "mean over the tokens",
    "mean_kl_to_student": "mean over the tokens",
    "mean_kl_to_teacher": "mean over the tokens",
    "log_weight_student": "log importance weight of the sample: Σ student_logprob − mixture_logprob",
    "log_weight_teacher": "the same for the teacher",
    "min_student_logprob": "student_logprob of the token that surprises the student most; null where it is −inf",
    "rare_tokens": f"how many tokens have a probability below {RARE:g} under the student",
    "answer_probability": "the student's probability of the expected answer where the text first writes it; null where "
    "it does not, or where no tokenizer said which tokens do",
    "sampling": "what the request asked for, as JSON",
    "seed": "the request's sampling_seed",
    "teacher_prompt_tokens": "length of the teacher's prompt",
    "teacher_prompt_ids": "the token ids that the teacher really read, chat template and all",
    "student_prompt_ids": "the same for the student: what comes before token_ids in training",
    "latency": "seconds from request to answer",
    **{name: "as the server named it" for name in MODEL_COLUMNS},
    "accepted": "passed all filters",
    "rejected_by": "the filter that refused it",
    "reject_reason": "why",
}
"""Every column that all runs store and its meaning, for the dataset card."""


def _top_k_meanings(side: str) -> dict[str, str]:
    return {
        "ids": f"per token: the ids that are likeliest under the {side}, best first; fewer where the support ends",
        **{f"{of}_logprobs": f"their log-probabilities under the {of}, nats" for of in SIDES},
        **{f"{of}_tail": f"per token: the probability of all other ids under the {of}" for of in SIDES},
    }


OPTIONAL_COLUMNS = {
    "teacher_entropy": "per token: entropy of the teacher, nats",
    "student_entropy": "per token: entropy of the student, nats",
    "mixture_entropy": "per token: entropy of the mixture, nats",
    "kl_student_teacher": "per token: KL(student‖teacher), nats",
    "kl_teacher_student": "per token: KL(teacher‖student), nats",
    "ess_student": "per token: 1 / Σ p_student²/q, a share of the samples",
    "ess_teacher": "per token: 1 / Σ p_teacher²/q, a share of the samples",
    "teacher_rank": "per token: how many ids the teacher finds likelier, and 1",
    "student_rank": "per token: how many ids the student finds likelier, and 1",
    "behaviour_logprob": "per token: log-probability with which it was drawn (after top-p and the like), nats",
    **{top_k_column(side, name): meaning for side in SIDES for name, meaning in _top_k_meanings(side).items()},
}
"""The columns that a run stores if it asks for them (``output.series``, ``output.return_top_k``), and their meaning."""


def schema(optional: Collection[str] = ()) -> pyarrow.Schema:
    """Arrow schema of the stored rows, with these of `OPTIONAL_COLUMNS`."""
    import pyarrow as pa

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {
        "sample_index": pa.int32(),
        "step": pa.int32(),
        "student_messages": messages,
        "teacher_messages": messages,
        "token_ids": pa.list_(pa.int32()),
        "num_tokens": pa.int32(),
        "min_student_logprob": pa.float64(),
        "rare_tokens": pa.int32(),
        "answer_probability": pa.float64(),
        **{name: pa.list_(pa.float32()) for name in SERIES},
        "seed": pa.int64(),
        "teacher_prompt_tokens": pa.int32(),
        "teacher_prompt_ids": pa.list_(pa.int32()),
        "student_prompt_ids": pa.list_(pa.int32()),
        "latency": pa.float64(),
        "accepted": pa.bool_(),
    }
    floats = [name for name in COLUMNS if name.startswith(("mean_", "log_weight_"))]
    types |= {name: pa.float64() for name in floats}
    for name in OPTIONAL_COLUMNS:
        values = pa.list_(pa.int32() if name in _INTEGERS else pa.float32())
        types[name] = pa.list_(values) if name in _NESTED else values
    names = [*COLUMNS, *(name for name in OPTIONAL_COLUMNS if name in optional)]
    return pa.schema([(name, types.get(name, pa.string())) for name in names])


RANKS = ("teacher_rank", "student_rank")
_INTEGERS = {*RANKS, *(top_k_column(side, "ids") for side in SIDES)}
_NESTED = {top_k_column(side, name) for side in SIDES for name in ARRAYS if not name.endswith("_tail")}


def has_top_k(columns: Collection[str]) -> bool:
    """Whether any of them has k values a token, so that a row of it may have millions."""
    return not _NESTED.isdisjoint(columns)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def stored_float(value: float | None) -> float | None:
    """A float32's worth of digits; None for what JSON cannot write (a token without support has logprob −inf)."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.7g}")


def _stored_as(name: str, value: float | None) -> float | None:
    stored = stored_float(value)
    return int(stored) if name in RANKS and stored is not None else stored


def context_text(context: Context) -> str:
    """One text for a context: itself, or its messages as canonical JSON; what the hash is of."""
    return context if isinstance(context, str) else _json(context)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _context(side: str, context: Context) -> dict[str, Any]:
    plain = isinstance(context, str)
    return {
        f"{side}_messages": None if plain else context,
        f"{side}_text": context if plain else None,
        f"{side}_context_sha256": sha256(context_text(context)),
    }


def _difference(values: Sequence[float], others: Sequence[float]) -> float:
    return math.fsum(values) - math.fsum(others) if values and len(values) == len(others) else math.nan


def _stored(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else _json(value)


def stored_fields(fields: dict[str, Any]) -> str:
    """The column ``fields`` as it comes back from the disk."""
    return _json(fields).encode(errors="replace").decode()


def _json(value: Any) -> str:
    return written_json(value, sort_keys=True)
