"""The scores of a given completion, on their way from the engine to a client."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sglang_optimal.names import TOP_K
from sglang_optimal.top_k import TopK, public
from sglang_optimal.wanted import Wanted

SCORED = "scored"
"""Key of `ScoredTokens` among what the scheduler says of a request."""


@dataclasses.dataclass
class ScoredTokens:
    """What was computed for each token of a completion.

    Attributes:
        wanted: what the client asked for.
        token_ids: [L] the completion's.
        values: [L, C + 4·S·k] float32: the series ``wanted.columns``, and the most likely tokens.
    """

    wanted: Wanted
    token_ids: list[int]
    values: np.ndarray

    def meta_info(self) -> dict[str, Any]:
        """The series that were asked for, as of tokens that were drawn."""
        wanted, columns = self.wanted, self.wanted.columns
        series: dict[str, Any] = {name: self.values[:, columns.index(name)].tolist() for name in wanted.names}
        if wanted.top_k:
            rows = self.values[:, len(columns) :].reshape(len(self.values), len(wanted.sides), 4, wanted.top_k)
            series[TOP_K] = public([TopK(wanted.sides, wanted.top_k_format, row) for row in rows])
        return series
