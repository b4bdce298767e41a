"""What a sample cost."""

from __future__ import annotations

import json
from typing import Any

ALONE = "model_run"
"""Key of a record's ``sampling``: the one model that its tokens were drawn from, where the other did not run."""


def passes(row: dict[str, Any]) -> int:
    """Forward passes of a stored sample's tokens: one of each model for a token of a mixture, one in all where one
    model ran alone. Prompts are not counted, and a student that drafts takes others.

    Args:
        row: with ``num_tokens`` and ``sampling``.
    """
    return row["num_tokens"] * (1 if json.loads(row["sampling"]).get(ALONE) else 2)
