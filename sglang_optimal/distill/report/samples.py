"""Samples to look at: which, and as the page shows them, with their tokens' texts and per-token series."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_optimal.distill.surprise import finite_or_impossible, least_logprob, tokens_below
from sglang_optimal.distill.token_texts import local_tokenizer
from sglang_optimal.names import SERIES
from sglang_optimal.token_view import decoder, token_pieces

Stratum = tuple[str, str] | None
"""None for accepted records, else (filter, reason)."""

TOKEN_BUDGET = 250_000
"""Most tokens in one page, about 13 MB; longer samples are cut evenly when the selected ones have more."""
_KEPT = (
    "id", "problem_id", "strategy", "sample_index", "text", "num_tokens", "finish_reason", "mean_alpha",
    "mean_teacher_logprob", "mean_student_logprob", "mean_mixture_logprob", "mean_kl_to_student",
    "mean_kl_to_teacher", "log_weight_student", "answer_probability", "seed", "latency", "accepted",
    "rejected_by", "reject_reason",
)  # fmt: skip


class Selection:
    """A random choice from a stream of rows whose number is not known, with room for ``size`` rows in all: half of them
    accepted, the others spread over the reasons for rejection.

    Every row draws a key, and each stratum keeps the rows with the smallest keys; when there are too many, the largest
    stratum gives one up and from then on takes only smaller keys. So each stratum's rows are a uniform sample of it.
    """

    def __init__(self, size: int):
        self._size = size
        self._random = np.random.default_rng(0)
        self._kept: dict[Stratum, list[tuple[float, int, dict[str, Any]]]] = {}
        self._limits: dict[Stratum, float] = {}
        self._total = self._number = 0

    def offer(self, stratum: Stratum, row: Callable[[], dict[str, Any]]) -> None:
        """``row`` is called where it is kept."""
        key = self._random.random()
        if not self._size or key >= self._limits.get(stratum, 1.0):
            return
        self._number += 1  # keys may tie, and rows have no order
        heapq.heappush(self._kept.setdefault(stratum, []), (-key, self._number, row()))
        self._total += 1
        if self._total > self._size:
            given_up = self._largest()
            self._limits[given_up] = -heapq.heappop(self._kept[given_up])[0]
            self._total -= 1

    def rows(self) -> list[dict[str, Any]]:
        """In the order of the run."""
        entries = [entry for kept in self._kept.values() for entry in kept]
        return [row for _, _, row in sorted(entries, key=lambda entry: entry[1])]

    def _largest(self) -> Stratum:
        if 2 * len(self._kept.get(None, ())) > self._total:
            return None
        return max((s for s in self._kept if s is not None), key=lambda s: len(self._kept[s]))


def choose_tokenizer(explicit: str | None, models: Sequence[str], rows: Sequence[dict[str, Any]]):
    """The tokenizer that splits the samples.

    Args:
        explicit: folder or id that the user asked for.
        models: folders or ids to try in turn otherwise.
        rows: selected samples.

    Returns:
        (tokenizer, name, whether it decodes most samples to their texts); (None, None, True) without one.

    Raises:
        ValueError: ``explicit`` cannot be read or cannot decode the samples.
    """
    for name in [explicit] if explicit else models:
        tokenizer = local_tokenizer(name)
        if tokenizer is None:
            if explicit:
                raise ValueError(f"tokenizer: {name!r} is no tokenizer in a folder or in the local Hugging Face cache.")
            continue
        try:
            good = sum(_agrees(tokenizer, row) for row in rows[:20])
        except Exception as error:  # ids beyond its vocabulary, in the words of any tokenizer
            if explicit:
                raise ValueError(f"tokenizer: {name!r} cannot decode the samples: {error}") from None
            continue
        agrees = 2 * good >= len(rows[:20])
        if explicit or agrees:
            return tokenizer, name, agrees
    return None, None, True


def sample_data(rows: Sequence[dict[str, Any]], tokenizer: Any = None) -> list[dict[str, Any]]:
    """What the page's script gets of each row: plain JSON values, without NaN.

    ``series``: lists of one length, that of ``ids``, and of ``pieces`` with a tokenizer; ``special``: indices of
    special tokens.
    """
    limit = token_limit([len(row["token_ids"]) for row in rows], TOKEN_BUDGET)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    decode = decoder(tokenizer, skip_special_tokens=False) if tokenizer is not None else None
    samples = []
    for row in rows:
        ids = row["token_ids"][:limit]
        fields = json.loads(row["fields"] or "{}")
        others = {name: value for name, value in fields.items() if name not in ("problem", "answer")}
        samples.append(
            {name: _number(row[name]) for name in _KEPT}
            | _surprise(row)
            | {
                "name": problem_name(row),
                "problem": row["problem"],
                "answer": row["answer"],
                "fields": json.dumps(others, ensure_ascii=False, indent=2) if others else None,
                "teacher": _context(row, "teacher"),
                "student": _context(row, "student"),
                "ids": ids,
                "series": {name: [_number(v) for v in row[name][:limit]] for name in SERIES if row[name]},
                "pieces": token_pieces(decode, ids) if decode else None,
                "special": [i for i, token in enumerate(ids) if token in special],
            }
        )
    return samples


def _surprise(row: dict[str, Any]) -> dict[str, Any]:
    """``least``: the student's probability of the token that surprises most; ``rare``: tokens below `RARE`; None where
    they are not known."""
    rare, least = row["rare_tokens"], row["min_student_logprob"]
    if rare is None and len(row["student_logprob"]) == row["num_tokens"]:  # of an older version
        rare, least = tokens_below(row["student_logprob"]), least_logprob(row["student_logprob"])
    if not row["num_tokens"] or rare is None:
        return {"rare": None, "least": None}
    return {"rare": rare, "least": _number(math.exp(finite_or_impossible(least)))}


NAME_CHARACTERS = 90


def problem_name(row: dict[str, Any]) -> str:
    """The first words of the problem: of its field, or of what the student read last; else the record's id."""
    said = row["problem"] or (_context(row, "student") or [{"content": ""}])[-1]["content"] or ""
    line = " ".join(said.split())
    if len(line) > NAME_CHARACTERS:
        line = line[:NAME_CHARACTERS].rpartition(" ")[0] or line[:NAME_CHARACTERS]
        line += " …"
    return line or row["id"]


def token_limit(lengths: Sequence[int], budget: int) -> int:
    """Largest cut for every sample so that all of them together have at most ``budget`` tokens."""
    left, limit = budget, 0
    ordered = sorted(lengths)
    for i, length in enumerate(ordered):
        share = left // (len(ordered) - i)
        if length > share:
            return max(1, share)
        left -= length
        limit = length
    return max(1, limit)


def _agrees(tokenizer: Any, row: dict[str, Any]) -> bool:
    """Whether the ids decode to the sample's text, but for a stop string that the text lacks."""
    decoded = tokenizer.decode(row["token_ids"], skip_special_tokens=True).strip()
    return decoded.startswith(row["text"].strip().rstrip("\ufffd"))


def _context(row: dict[str, Any], side: str) -> list[dict[str, str | None]]:
    """Messages; plain text is one without a role."""
    messages = row[f"{side}_messages"]
    if messages is None:
        return [{"role": None, "content": row[f"{side}_text"] or ""}]
    return [{"role": message.get("role"), "content": message.get("content") or ""} for message in messages]


def _number(value: Any) -> Any:
    """Floats to four digits, enough to read and half the size; null for what JSON cannot write."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None
