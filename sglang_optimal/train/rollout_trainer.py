"""Trains the student on what a sampler draws meanwhile, and gives the sampler the student as it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_optimal.names import SERIES
from sglang_optimal.top_k import top_k_columns
from sglang_optimal.train.config import TrainConfig
from sglang_optimal.train.record_trainer import RecordTrainer
from sglang_optimal.train.sampler import (
    Sampler,
    SamplerUpdates,
    Sampling,
    check_sample,
    give_weights,
    sampling_at,
    with_series,
)


class RolloutTrainer(RecordTrainer):
    """Each step: sample with the mixture of teacher and present student, train on it, update the sampler's student.

    Args:
        model: the student, as in `RecordTrainer`. The sampler gets its weights before the first step, so that both are
            one model, also after resuming.
        args: `TrainConfig`; ``update_every`` steps lie between updates. In one process.
        sampler: an `OptimalSampler` whose student has weights of its own (another model, or
            ``student_weights="separate"``).
        train_dataset: rows with ``prompt`` (what the teacher reads) and ``student_prompt``: text, token ids or
            messages, as `OptimalSampler.generate` takes them.
        sampling: parameters of ``generate``, such as ``{"max_new_tokens": 64, "n": 4}``; temperature 1 by default. Or
            a function of the optimizer steps that are done, which gives them: a ``kl_budget`` that falls.
        **more: Trainer's own arguments.

    Raises:
        ValueError: more than one process; a row without prompts; samples without what the loss needs.
        RuntimeError: a sample was aborted, or has no tokens.
    """

    def __init__(
        self,
        model: Any,
        args: TrainConfig,
        sampler: Sampler,
        train_dataset: Any,
        *,
        sampling: Sampling | None = None,
        **more: Any,
    ):
        if args.world_size > 1:
            raise ValueError("args: RolloutTrainer runs in one process; its sampler holds the engine.")
        self.sampler = sampler
        first = sampling_at(sampling, 0)  # refused before the first step
        self.sampling = sampling if callable(sampling) else first
        super().__init__(model, args, train_dataset, **{"data_collator": list, **more})
        self.add_callback(SamplerUpdates(self, args.update_every))

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Samples for the rows of the batch, then Trainer's own step."""
        return super().training_step(model, self.records(self.rollouts(inputs)), num_items_in_batch)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As `training_step`, for evaluation."""
        return super().prediction_step(model, self.records(self.rollouts(inputs)), *args, **kwargs)

    def rollouts(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Sample for rows with prompts.

        Returns:
            Records of the columns that `RecordCollator` reads, ``n`` for each row.
        """
        for name in ("prompt", "student_prompt"):
            if any(row.get(name) is None for row in rows):
                raise ValueError(f"{name}: every row of train_dataset needs one; the teacher reads `prompt`.")
        sampling = {"temperature": 1.0, **sampling_at(self.sampling, self.state.global_step)}
        asked = with_series(sampling, [*SERIES, "behaviour_logprob"])
        students = [row["student_prompt"] for row in rows]
        results = self.sampler.generate([row["prompt"] for row in rows], students, **asked)
        flat = [each for result in results for each in (result if isinstance(result, list) else [result])]
        drawn = json.dumps(_how_drawn(sampling))
        return [{**_record(result, students[result.index]), "sampling": drawn} for result in flat]

    def update_sampler(self) -> None:
        """Give the sampler the student's present weights, an adapter merged."""
        give_weights(self.sampler, self.accelerator.unwrap_model(self.model))


_SERIES = (*SERIES, "behaviour_logprob")


def _record(result: Any, student_prompt: Any) -> dict[str, Any]:
    check_sample(result)
    said = {**result.meta_info, **result.mixing_info}
    ids = said.get("student_prompt_ids")
    if ids is None:
        if isinstance(student_prompt, str) or not isinstance(student_prompt[0], int):
            raise ValueError("student_prompt: the sampler does not return prompts; give token ids.")
        ids = student_prompt
    extra = {name: said[name] for name in said if name in _SERIES or name.startswith("top_k_")}
    extra |= top_k_columns(getattr(result, "top_k", None) or {})
    return {**extra, "student_prompt_ids": ids, "token_ids": result.token_ids}


def _how_drawn(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how the tokens are drawn from q*."""
    given = {**(sampling.get("sampling_params") or {}), **sampling}
    return {name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if given.get(name) is not None}
