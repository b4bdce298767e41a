"""Per-token columns that are made of a record's series: importance weights, and a mask of surprises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

TOWARDS = ("student", "teacher")
"""Whose samples weighted samples are to be read as."""
WEIGHTED = ("trl-tokens", "records")
"""Formats with the token ids, to which such columns are aligned."""
LARGEST = 3.4028234663852886e38
"""Of float32, in which weights are stored."""


@dataclasses.dataclass(frozen=True)
class TokenColumns:
    """What to make of every record.

    Attributes:
        weights: one of `TOWARDS`, for the column ``weights``; None: no such column.
        max_weight: cut larger weights down to it (truncated importance sampling: Ionides, 2008); None: do not.
        mask_below: for the column ``mask``: 0 at tokens to which the student gave a smaller probability than this, in
            (0, 1]; None: no such column.
    """

    weights: str | None = None
    max_weight: float | None = None
    mask_below: float | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights not in TOWARDS:
            raise ValueError(f"--weights: must be {' or '.join(TOWARDS)}, got {self.weights!r}.")
        if self.max_weight is not None and self.weights is None:
            raise ValueError("--max-weight: is only read with --weights.")
        if self.max_weight is not None and not 0 < self.max_weight <= LARGEST:
            raise ValueError(f"--max-weight: must be a positive number, got {self.max_weight}.")
        if self.mask_below is not None and not 0 < self.mask_below <= 1:
            raise ValueError(f"--mask-below: must be a probability, above 0 and at most 1, got {self.mask_below}.")

    @property
    def names(self) -> list[str]:
        return [*(["weights"] if self.weights else []), *(["mask"] if self.mask_below is not None else [])]

    def of(self, row: dict[str, Any]) -> dict[str, list[Any]]:
        """``weights`` (floats) and ``mask`` (0 or 1) of a stored row, one for each of its ``token_ids``.

        A weight is p(y)/b(y), p as the student (or teacher) had it when it was sampled, b the probability with which
        the token was drawn. A log-probability of null is −inf: weight 0, and masked.

        Raises:
            ValueError: the series were not stored, what drew the tokens is not known, or a weight is too large.
        """
        made: dict[str, list[Any]] = {}
        if self.weights is not None:
            made["weights"] = self._weights(row, self.weights)
        if self.mask_below is not None:
            values = _series(row, "student_logprob", "--mask-below")
            floor = math.log(self.mask_below)
            floor -= 1e-6 * max(1.0, -floor)  # what is stored is rounded, and the floor itself is not below the floor
            made["mask"] = [int(value >= floor) for value in values]
        return made

    def _weights(self, row: dict[str, Any], towards: str) -> list[float]:
        from sglang_optimal.train.records import behaviour_column

        try:
            drawn = behaviour_column(row, f"record {row['id']}")
        except ValueError as error:
            raise ValueError(f"--weights: {error}") from None
        target, behaviour = _series(row, f"{towards}_logprob", "--weights"), _series(row, drawn, "--weights")
        if any(not math.isfinite(value) for value in behaviour):
            raise ValueError(f"--weights: record {row['id']} has a token that was drawn with probability 0.")
        logs = [own - other for own, other in zip(target, behaviour, strict=True)]
        if self.max_weight is not None:
            most = math.log(self.max_weight)
            return [self.max_weight if value >= most else math.exp(value) for value in logs]
        if max(logs, default=0.0) >= math.log(LARGEST):
            raise ValueError(f"--max-weight: is needed; record {row['id']} has a weight that float32 cannot hold.")
        return [math.exp(value) for value in logs]


def _series(row: dict[str, Any], name: str, flag: str) -> Sequence[float]:
    values, length = row.get(name) or [], len(row["token_ids"])
    if len(values) != length:
        raise ValueError(
            f"{flag}: record {row['id']} has {len(values)} values of {name} for {length} tokens; a run keeps them "
            "unless output.series is false."
        )
    return [-math.inf if value is None else value for value in values]
