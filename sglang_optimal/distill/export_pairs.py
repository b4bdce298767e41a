"""Accepted and rejected samples of one problem against each other: preference pairs and labels."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

from sglang_optimal.distill.filters.chain import CHARACTERS
from sglang_optimal.distill.manifests import read_manifests
from sglang_optimal.distill.selection import SELECT

PAIRS, LABELS = "trl-dpo", "trl-kto"
JUDGED = (PAIRS, LABELS)
"""Formats that read accepted and rejected records: pairs of both, and each with a label."""

PICKS = {
    "order": "the first of each, by the number of the sample",
    "weight": "the greatest sums of both samples' log_weight_student: what the student might have written itself",
    "prefix": "the most tokens that both begin with: they differ late",
}
"""Which pairs of a problem come first: what that means."""

NO_TEXT, DUPLICATE, OTHER_FILTER, NOT_SELECTED = "no-text", "duplicate", "other-filter", "not-selected"
UNPAIRED_RECORDS = {
    NO_TEXT: "nothing was sampled (the server refused them), or their text has bytes that are no character",
    DUPLICATE: "the student has another sample of the same text in this context",
    OTHER_FILTER: "another filter than those of --rejected-by refused them",
    NOT_SELECTED: "the filters accepted them, and `distill filter` selected others of the problem",
}
"""Why a record is in no row of a format of `JUDGED`: what it means."""
ONE_SIDED = "one-sided"
UNPAIRED_PROBLEMS = {ONE_SIDED: "no accepted and rejected sample of one student's context is left"}
"""Why a problem has no pair: what it means."""

COLUMNS = (
    "id", "problem_id", "strategy", "sample_index", "student_messages", "student_text", "student_context_sha256",
    "student_prompt_ids", "student_model", "text", "token_ids", "finish_reason", "sampling", "log_weight_student",
    "accepted", "rejected_by",
)  # fmt: skip
"""Stored columns that `Judged` reads."""


@dataclasses.dataclass(frozen=True)
class _Sample:
    """What is kept of a record: a run's tokens would not fit in memory as lists."""

    index: int
    strategy: str
    accepted: bool
    text: str
    weight: float
    tokens: tuple[int, ...]
    shaped: dict[str, Any]
    extra: dict[str, Any]


class Judged:
    """A run's records by problem and by what the student read.

    Args:
        folder: of the run.
        checked: (stored row, prompt and completion) as they are written, or None if the record is left out.
        extra: stored columns to keep.
        rejected_by: labels of filters, of whose rejected records alone use is made; None: of all.
        pick: one of `PICKS`.

    Attributes:
        left_out: number of records, and of problems, for each reason in `UNPAIRED_RECORDS` and `UNPAIRED_PROBLEMS`.

    Raises:
        ValueError: ``rejected_by`` names a filter that the run has not got.
    """

    def __init__(
        self,
        folder: Path,
        checked: Callable[[dict[str, Any]], dict[str, Any] | None],
        *,
        extra: Iterable[str] = (),
        rejected_by: Iterable[str] | None = None,
        pick: str = "order",
    ):
        self.left_out: Counter[str] = Counter()
        self._checked, self._extra, self._pick = checked, list(extra), pick
        filters = [
            filter
            for manifest in read_manifests(folder)
            for run in (manifest, *(manifest.get("sources") or ()))
            for filter in (run.get("config") or {}).get("filters") or ()
            if isinstance(filter, dict)
        ]
        labels = {filter.get("name") or filter.get("type") for filter in filters}
        # A repeated text was right when it came first.
        self._repeats = {f.get("name") or f["type"] for f in filters if f.get("type") == "deduplicate"}
        self._repeats |= {"deduplicate"} - labels
        self._by = None if rejected_by is None else set(rejected_by)
        if self._by is not None and labels and (unknown := sorted(self._by - labels)):
            raise ValueError(
                f"--rejected-by: the run has no filter {unknown[0]!r}; it has {', '.join(sorted(map(str, labels)))}."
            )

    def shaped(self, rows: Iterable[dict[str, Any]], format: str, pairs: int | None = 1) -> Iterator[dict[str, Any]]:
        """Rows of a format of `JUDGED`, the same whenever it is asked.

        Args:
            rows: stored, with `COLUMNS` and the extra ones.
            format: ``trl-dpo`` or ``trl-kto``.
            pairs: most pairs of a problem; None: all.
        """
        problems = self._read(rows)
        if format == PAIRS:
            for contexts in problems.values():
                yield from self._pairs(contexts, pairs)
        else:
            # Not one problem after the other: TRL takes the completion of the row before as one of another prompt, from
            # which it estimates KTO's KL.
            turns = zip_longest(*(list(chain.from_iterable(contexts)) for contexts in problems.values()))
            for sample in chain.from_iterable(turns):
                if sample is not None:
                    yield {**sample.shaped, "label": sample.accepted, **sample.extra}

    def _read(self, rows: Iterable[dict[str, Any]]) -> dict[str, list[list[_Sample]]]:
        """Of each problem, in the order in which they come: the samples of each context, without repeated texts."""
        problems: dict[str, dict[tuple, list[_Sample]]] = {}
        for row in rows:
            shaped = self._useful(row)
            if shaped is None:
                continue
            variables = json.loads(row["sampling"] or "{}").get("student_chat_template_kwargs") or {}
            # The ids too: one context, sent to servers with two templates, is two.
            ids = tuple(row["student_prompt_ids"] or ())
            context = (row["student_context_sha256"], json.dumps(variables, sort_keys=True), hash(ids))
            sample = _Sample(
                row["sample_index"], row["strategy"], row["accepted"], row["text"],
                -math.inf if row["log_weight_student"] is None else row["log_weight_student"],
                tuple(row["token_ids"]) if self._pick == "prefix" else (), shaped,
                {name: row.get(name) for name in self._extra},
            )  # fmt: skip
            problems.setdefault(row["problem_id"], {}).setdefault(context, []).append(sample)
        return {name: [self._distinct(own) for own in contexts.values()] for name, contexts in problems.items()}

    def _useful(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Prompt and completion, or None of a record that says nothing about right and wrong."""
        reason = None
        if not row["token_ids"] or row["rejected_by"] == CHARACTERS:
            reason = NO_TEXT
        elif not row["accepted"] and row["rejected_by"] in self._repeats:
            reason = DUPLICATE
        elif not row["accepted"] and row["rejected_by"] == SELECT:  # right, and not the best
            reason = NOT_SELECTED
        elif not row["accepted"] and self._by is not None and row["rejected_by"] not in self._by:
            reason = OTHER_FILTER
        if reason is not None:
            self.left_out[reason] += 1
            return None
        return self._checked(row)

    def _distinct(self, samples: list[_Sample]) -> list[_Sample]:
        """In their order; of equal texts the accepted one, else the first: a filter may look at more than the text."""
        samples = sorted(samples, key=lambda sample: (not sample.accepted, sample.index, sample.strategy))
        first: dict[str, _Sample] = {}
        for sample in samples:
            first.setdefault(sample.text, sample)
        self.left_out.update({DUPLICATE: len(samples) - len(first)} if len(first) < len(samples) else {})
        return sorted(first.values(), key=lambda sample: (sample.index, sample.strategy))

    def _pairs(self, contexts: list[list[_Sample]], most: int | None) -> Iterator[dict[str, Any]]:
        found = []
        for samples in contexts:
            chosen = [sample for sample in samples if sample.accepted]
            rejected = [sample for sample in samples if not sample.accepted]
            found += list(product(chosen, rejected))
        if not found:
            self.left_out[ONE_SIDED] += 1
            return
        found.sort(key=self._rank)
        for one, other in found if most is None else _spread(found, most):
            yield {
                "prompt": one.shaped["prompt"],
                "chosen": one.shaped["completion"],
                "rejected": other.shaped["completion"],
                **{name: value for name, value in one.shaped.items() if name not in ("prompt", "completion")},
                **{f"chosen_{name}": value for name, value in one.extra.items()},
                **{f"rejected_{name}": value for name, value in other.extra.items()},
            }

    def _rank(self, pair: tuple[_Sample, _Sample]) -> tuple:
        one, other = pair
        score = 0.0
        if self._pick == "weight":
            score = -(one.weight + other.weight)
        elif self._pick == "prefix":
            score = -_common(one.tokens, other.tokens)
        return score, one.index, other.index, one.strategy, other.strategy


def _spread(pairs: list[tuple[_Sample, _Sample]], most: int) -> Iterator[tuple[_Sample, _Sample]]:
    """The best of those whose samples were used least, again and again."""
    uses: Counter[int] = Counter()
    left = list(pairs)
    for _ in range(min(most, len(pairs))):
        best = min(range(len(left)), key=lambda i: (sum(uses[id(sample)] for sample in left[i]), i))
        pair = left.pop(best)
        uses.update(id(sample) for sample in pair)
        yield pair


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
