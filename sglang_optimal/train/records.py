"""Rows of distillation records as batches of tensors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_optimal.train.objective import Objective

PROMPT_COLUMNS = ("student_prompt_ids", "prompt_ids")
COMPLETION_COLUMNS = ("token_ids", "completion_ids")
"""Names of records, and of TRL."""

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class RecordCollator:
    """Pads records to a batch: prompts on the left, completions on the right, so that all completions begin together.

    Attributes:
        objective: says which columns are needed.
        temperature: of all requests, in place of what the column ``sampling`` says (JSON, as `distill` writes it);
            None: that. 0 (greedy) is read as 1, as the series are.
        behaviour: the column with the log-probability with which each token was drawn. None: ``behaviour_logprob``
            where there is one; else ``mixture_logprob``, if ``sampling`` says that nothing (top-p, top-k, min-p,
            temperature 0) came between q* and the draw.
        max_length: the most tokens of prompt and completion together; None: no limit.
    """

    objective: Objective
    temperature: float | None = None
    behaviour: str | None = None
    max_length: int | None = None

    def __post_init__(self):
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature: must not be negative, got {self.temperature}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of B rows, P the longest prompt, L the longest completion.

        Returns:
            ``input_ids``, ``attention_mask``, ``position_ids``, ``labels`` [B, P + L] int64 (labels: −100 but for the
            completion); ``token_ids`` [B, L] int64 and ``mask`` [B, L] bool of the completion; and what the objective
            needs: ``temperature`` [B], series [B, L], ``top_k_ids`` [B, L, k] int64, ``top_k_logprobs`` [B, L, k],
            ``top_k_tail`` [B, L], float32. k is the most ids that a position of the batch has; positions with fewer,
            where the support ends, are filled with ids outside it, at −inf.

        Raises:
            ValueError: a missing or empty column, lists whose lengths differ from the completion's, ids and
                log-probabilities that do not match, ids that are not different, a temperature or a behaviour that is
                not known. The message names row and column.
        """
        if not rows:
            raise ValueError("rows: a batch needs at least one record.")
        prompts = [_column(row, PROMPT_COLUMNS, i) for i, row in enumerate(rows)]
        completions = [_column(row, COMPLETION_COLUMNS, i) for i, row in enumerate(rows)]
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if self.max_length is not None and len(prompt) + len(completion) > self.max_length:
                raise ValueError(
                    f"max_length: {_name(rows[i], i)} has {len(prompt)} + {len(completion)} tokens, more than "
                    f"{self.max_length}; filter the dataset, or raise it."
                )
        longest_prompt, longest = max(map(len, prompts)), max(map(len, completions))
        input_ids, attended, labels = [], [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            before, after = longest_prompt - len(prompt), longest - len(completion)
            input_ids.append([*[0] * before, *prompt, *completion, *[0] * after])
            attended.append([0] * before + [1] * (len(prompt) + len(completion)) + [0] * after)
            labels.append([*[IGNORED] * longest_prompt, *completion, *[IGNORED] * after])
        attention_mask = torch.tensor(attended)
        batch = {
            "input_ids": torch.tensor(input_ids),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
            "labels": torch.tensor(labels),
        }
        batch["token_ids"] = batch["input_ids"][:, longest_prompt:]
        batch["mask"] = attention_mask[:, longest_prompt:].bool()
        if self.objective.needs_temperature:
            batch["temperature"] = torch.tensor([self._temperature(row, i) for i, row in enumerate(rows)])
        for name in self.objective.series:
            columns = [self._behaviour(row, i) if name == "behaviour_logprob" else name for i, row in enumerate(rows)]
            batch[name] = torch.stack(
                [
                    _padded(_logprobs(_of_tokens(row, column, i, len(completions[i]))), longest, -math.inf)
                    for i, (row, column) in enumerate(zip(rows, columns, strict=True))
                ]
            )
        if self.objective.top_k is not None:
            batch |= self._top_k(rows, [len(completion) for completion in completions], longest)
        return batch

    def _temperature(self, row: Mapping[str, Any], i: int) -> float:
        temperature = self.temperature
        if temperature is None:
            temperature = _sampling(row).get("temperature")
        if temperature is None:
            raise ValueError(
                f"temperature: {_name(row, i)} has no `sampling` that tells it; give the temperature of the requests."
            )
        return float(temperature) or 1.0

    def _behaviour(self, row: Mapping[str, Any], i: int) -> str:
        return self.behaviour if self.behaviour is not None else behaviour_column(row, _name(row, i))

    def _top_k(self, rows: Sequence[Mapping[str, Any]], lengths: list[int], longest: int) -> dict[str, Tensor]:
        assert self.objective.top_k is not None
        ids_name, logprobs_name, tail_name = self.objective.top_k
        listed = [_of_tokens(row, ids_name, i, lengths[i]) for i, row in enumerate(rows)]
        k = max(len(inner) for each in listed for inner in each)
        if k < 1:
            raise ValueError(f"{ids_name}: {_name(rows[0], 0)} has no ids at any token.")
        ids: list[Tensor] = []
        logprobs: list[Tensor] = []
        tails: list[Tensor] = []
        for i, row in enumerate(rows):
            values = _of_tokens(row, logprobs_name, i, lengths[i])
            for at, (inner, own) in enumerate(zip(listed[i], values, strict=True)):
                if len(own) != len(inner):
                    raise ValueError(
                        f"{logprobs_name}: {_name(row, i)} has {len(own)} values for {len(inner)} ids at token {at}."
                    )
            found = torch.tensor([_filled(inner, k) for inner in listed[i]])
            ordered = found.sort(-1).values
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()) or bool((found < 0).any()):
                raise ValueError(f"{ids_name}: {_name(row, i)} has a negative id, or one twice at a position.")
            ids.append(found)
            logprobs.append(torch.stack([_padded(_logprobs(own), k, -math.inf) for own in values]))
            tails.append(torch.tensor([float(value) for value in _of_tokens(row, tail_name, i, lengths[i])]))
        # Padding is all tail: a distribution like any other.
        padding = torch.arange(k)
        return {
            "top_k_ids": torch.stack([_padded(found, longest, padding) for found in ids]),
            "top_k_logprobs": torch.stack([_padded(found, longest, -math.inf) for found in logprobs]),
            "top_k_tail": torch.stack([_padded(found, longest, 1.0) for found in tails]),
        }


def behaviour_column(row: Mapping[str, Any], name: str) -> str:
    """The column with the log-probability with which a record's tokens were drawn.

    Args:
        row: a record as it is stored.
        name: of the record, for the message.

    Returns:
        ``behaviour_logprob`` where the record has it; else ``mixture_logprob``.

    Raises:
        ValueError: it has not, and `sampling` does not say that nothing came between q* and the draw.
    """
    if row.get("behaviour_logprob"):
        return "behaviour_logprob"
    sampling = _sampling(row)
    cut = [key for key, cuts in _CUTS.items() if key in sampling and cuts(sampling[key])]
    if "temperature" not in sampling or cut:
        drawn = ", ".join(f"{key} {sampling[key]}" for key in cut)
        raise ValueError(
            f"behaviour: {name} {f'was drawn with {drawn}' if cut else 'has no `sampling`'}, so that "
            "`mixture_logprob` may not be the log-probability with which its tokens were drawn; add a column "
            "behaviour_logprob, or name the column to take in its place."
        )
    return "mixture_logprob"


# Whether a sampling parameter of SGLang's comes between q* and the draw.
_CUTS = {
    "temperature": lambda value: value == 0,
    "top_p": lambda value: value < 1,
    "top_k": lambda value: 0 < value < 1 << 30,
    "min_p": lambda value: value > 0,
}


def _sampling(row: Mapping[str, Any]) -> dict[str, Any]:
    found = row.get("sampling")
    return json.loads(found) if isinstance(found, str) and found else dict(found or {})


def _name(row: Mapping[str, Any], i: int) -> str:
    return f"record {row['id']}" if row.get("id") else f"row {i} of the batch"


def _column(row: Mapping[str, Any], names: Sequence[str], i: int) -> list[int]:
    for name in names:
        if row.get(name) is not None and len(row[name]):
            return [int(token) for token in row[name]]
    raise ValueError(f"{names[0]}: {_name(row, i)} has none (nor {names[1]}); records of older versions lack it.")


def _of_tokens(row: Mapping[str, Any], name: str, i: int, length: int) -> Sequence[Any]:
    values = row.get(name)
    if values is None or (not len(values) and length):
        raise ValueError(f"{name}: {_name(row, i)} has none, and the loss needs it; see docs/training.md.")
    if len(values) != length:
        raise ValueError(f"{name}: {_name(row, i)} has {len(values)} values for {length} tokens.")
    return values


def _logprobs(values: Sequence[float | None]) -> Tensor:
    """Records have null where a log-probability is −inf, which JSON cannot write."""
    return torch.tensor([-math.inf if value is None else float(value) for value in values])


def _filled(ids: Sequence[int], k: int) -> list[int]:
    """k different ids: where the support ends before, others, whose log-probability is −inf as of all outside it."""
    given = [int(token) for token in ids]
    taken = set(given)
    free = (token for token in itertools.count() if token not in taken)
    return [*given, *itertools.islice(free, k - len(given))]


def _padded(values: Tensor, length: int, fill: float | Tensor) -> Tensor:
    padding = torch.as_tensor(fill, dtype=values.dtype).expand(length - len(values), *values.shape[1:])
    return torch.cat([values, padding])
