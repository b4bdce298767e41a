"""The most likely tokens of each output token, on their way from the engine to a client."""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sglang_optimal.names import SIDES

FORMATS = ("lists", "base64")
ARRAYS = ("ids", *(f"{side}_logprobs" for side in SIDES), *(f"{side}_tail" for side in SIDES))
"""What there is of each side; see `decode_top_k`."""

_IDS = np.dtype("<i4")
_FLOATS = np.dtype("<f4")


@dataclasses.dataclass
class TopK:
    """The most likely tokens of some sides at one output token.

    Attributes:
        sides: whose.
        format: how the client wants them, of `FORMATS`.
        values: [sides, 4, k] float32: token ids, and the log-probabilities under teacher, student and mixture; beyond
            the support −1 and −inf.
    """

    sides: tuple[str, ...]
    format: str
    values: np.ndarray


def public(tokens: Sequence[TopK]) -> dict[str, dict[str, Any]]:
    """What a client gets for output tokens of one request.

    Returns:
        {side: {``ids``, ``teacher_logprobs``, ``student_logprobs``, ``mixture_logprobs``: an entry for each token with
        one for each of its most likely ones; ``teacher_tail``, ``student_tail``, ``mixture_tail``: the probability of
        all others under each distribution, one for each token}}. As lists, which end with the support, or as arrays in
        base64, which do not: {``dtype``, ``shape``, ``base64``}.
    """
    result = {}
    for i, side in enumerate(tokens[0].sides if tokens else ()):
        values = np.stack([token.values[i] for token in tokens])
        logprobs = dict(zip(SIDES, values[:, 1:].transpose(1, 0, 2), strict=True))
        tails = {name: _tail(rows) for name, rows in logprobs.items()}
        if tokens[0].format == "base64":
            entry: dict[str, Any] = {"ids": encoded("ids", values[:, 0])}
            entry |= {f"{name}_logprobs": encoded(f"{name}_logprobs", rows) for name, rows in logprobs.items()}
            entry |= {f"{name}_tail": encoded(f"{name}_tail", tail) for name, tail in tails.items()}
        else:
            counts = (values[:, 0] >= 0).sum(-1).tolist()
            entry = {"ids": _lists(values[:, 0].astype(_IDS), counts)}
            entry |= {f"{name}_logprobs": _lists(rows, counts) for name, rows in logprobs.items()}
            entry |= {f"{name}_tail": tail.tolist() for name, tail in tails.items()}
        result[side] = entry
    return result


def _tail(logprobs: np.ndarray) -> np.ndarray:
    """The probability of all other tokens, one for each row."""
    return np.maximum(1.0 - np.exp(logprobs.astype(np.float64)).sum(-1), 0.0)


def _lists(rows: np.ndarray, counts: Sequence[int]) -> list[list[Any]]:
    return _cut(rows.tolist(), counts)


def _cut(rows: Sequence[list[Any]], counts: Sequence[int]) -> list[list[Any]]:
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


def encoded(name: str, array: np.ndarray) -> dict[str, Any]:
    """One of `ARRAYS` as it travels in base64."""
    dtype = _IDS if name == "ids" else _FLOATS
    data = np.ascontiguousarray(array, dtype)
    return {"dtype": dtype.str, "shape": list(data.shape), "base64": base64.b64encode(data.tobytes()).decode("ascii")}


def decode_top_k(top_k: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of ``meta_info["top_k"]``, in either format.

    Args:
        top_k: as a server sends it.

    Returns:
        {side: {``ids``: [L, k] int32, ``teacher_logprobs``, ``student_logprobs``, ``mixture_logprobs``: [L, k] float32,
        ``teacher_tail``, ``student_tail``, ``mixture_tail``: [L] float32}} for L output tokens. Beyond the common
        support ids are −1 and log-probabilities −inf.

    Example:
        >>> from sglang_optimal import decode_top_k
        >>> decode_top_k({"teacher": {"ids": [[5, 3], [2]], "teacher_tail": [0.25, 0.0]}})["teacher"]["ids"].tolist()
        [[5, 3], [2, -1]]
    """
    return {side: {name: _decoded(name, value) for name, value in entry.items()} for side, entry in top_k.items()}


def _decoded(name: str, value: Any) -> np.ndarray:
    if isinstance(value, Mapping):
        data = base64.b64decode(value["base64"], validate=True)
        return np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"])
    dtype, missing = (_IDS, -1) if name == "ids" else (_FLOATS, -np.inf)
    if name.endswith("_tail"):
        return np.array(value, dtype)
    columns = list(itertools.zip_longest(*value, fillvalue=missing))
    return np.array(columns, dtype).T if columns else np.empty((len(value), 0), dtype)


def top_k_column(side: str, name: str) -> str:
    """The name that one of `ARRAYS` has in a record."""
    return f"top_k_{side}_{name}"


def top_k_columns(top_k: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[Any]]:
    """The arrays as columns of a record, in lists.

    Args:
        top_k: as `decode_top_k` gives it. A side without arrays has empty columns.

    Returns:
        {``top_k_SIDE_NAME``: for each of L output tokens a list of up to k values that ends with the support, of a tail
        one value; None for what JSON cannot write}.

    Example:
        >>> columns = top_k_columns(decode_top_k({"teacher": {"ids": [[5, 3], [2]], "teacher_tail": [0.25, 0.0]}}))
        >>> columns["top_k_teacher_ids"], columns["top_k_teacher_teacher_tail"]
        ([[5, 3], [2]], [0.25, 0.0])
    """
    columns: dict[str, list[Any]] = {}
    for side, arrays in top_k.items():
        counts = (arrays["ids"] >= 0).sum(-1).tolist() if "ids" in arrays else []
        for name in ARRAYS:
            values = _written(arrays[name]) if name in arrays else []
            if values and not name.endswith("_tail"):
                values = _cut(values, counts)
            columns[top_k_column(side, name)] = values
    return columns


def _written(array: np.ndarray) -> list[Any]:
    finite = np.isfinite(array)
    if finite.all():
        return array.tolist()
    values = array.astype(object)
    values[~finite] = None
    return values.tolist()
