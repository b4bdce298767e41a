"""Samples as the page shows them: their tokens' texts and per-token series."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from sglang_optimal.names import SERIES
from sglang_optimal.token_view import token_pieces

TOKEN_BUDGET = 250_000
"""Most tokens in one page, about 13 MB; longer samples are cut evenly when the selected ones have more."""
_KEPT = (
    "id", "problem_id", "strategy", "sample_index", "text", "num_tokens", "finish_reason", "mean_alpha",
    "mean_teacher_logprob", "mean_student_logprob", "mean_mixture_logprob", "mean_kl_to_student",
    "mean_kl_to_teacher", "log_weight_student", "seed", "latency", "accepted", "rejected_by", "reject_reason",
)  # fmt: skip


def load_tokenizer(name: str):
    """A tokenizer from this machine; None when there is none of that name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers and tokenizers raise whatever a broken file leads to
        return None


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
        tokenizer = load_tokenizer(name)
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
    decode = _decoder(tokenizer) if tokenizer is not None else None
    samples = []
    for row in rows:
        ids = row["token_ids"][:limit]
        fields = json.loads(row["fields"] or "{}")
        others = {name: value for name, value in fields.items() if name not in ("problem", "answer")}
        samples.append(
            {name: _number(row[name]) for name in _KEPT}
            | {
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


def _decoder(tokenizer: Any) -> Callable[[tuple[int, ...]], str]:
    known: dict[tuple[int, ...], str] = {(): ""}

    def decode(ids: tuple[int, ...]) -> str:
        if ids not in known:
            known[ids] = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return known[ids]

    return decode


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
