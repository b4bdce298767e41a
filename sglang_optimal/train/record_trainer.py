"""Trains the student on distillation records."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers import Trainer

from sglang_optimal.train.config import TrainConfig
from sglang_optimal.train.records import RecordCollator
from sglang_optimal.train.reduction import reduce


class RecordTrainer(Trainer):
    """transformers' Trainer with the losses of `sglang_optimal.train`, on records as `distill` stores them.

    It extends Trainer and not TRL's SFTTrainer, which tokenizes chats anew and replaces the model's head by one without
    logits; records hold the very ids, and divergences need the logits. peft models, evaluation, checkpoints, callbacks
    and accelerate are Trainer's.

    Args:
        model: the student, a causal language model of transformers, or a peft model of one.
        args: `TrainConfig`.
        train_dataset: a `datasets.Dataset` (or anything that Trainer takes) whose rows are records:
            ``student_prompt_ids`` and ``token_ids`` (or ``prompt_ids`` and ``completion_ids``), and what the loss
            needs, see docs/training.md.
        **more: Trainer's own arguments.

    The log has, beside Trainer's own figures, ``ess_ratio`` and ``clipped`` of losses with weights.

    Raises:
        ValueError: in a step, names the column that lacks or does not fit, see `RecordCollator`.
    """

    def __init__(self, model: Any, args: TrainConfig, train_dataset: Any = None, **more: Any):
        self.objective = args.objective()
        self.records = RecordCollator(self.objective, args.sampling_temperature, args.behaviour, args.max_length)
        self._figures: dict[str, list[torch.Tensor]] = defaultdict(list)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **{"data_collator": self.records, **more})
        if args.loss_reduction == "sequence":
            # A mean over sequences is not scaled by the number of tokens in accumulated batches.
            self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of `RecordCollator`; Trainer's seam."""
        length = inputs["token_ids"].shape[1]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            use_cache=False,
            logits_to_keep=length + 1,
        )
        logits = outputs.logits[:, -length - 1 : -1, : self.args.vocab_size]
        values, figures = self.objective(logits, inputs)
        for name, figure in figures.items():
            self._figures[name].append(figure)
        if num_items_in_batch is None:
            loss = reduce(values, inputs["mask"], self.args.loss_reduction)
        else:
            # The number of tokens of all accumulated batches on all devices, whose gradients are averaged.
            loss = values.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the objective's figures since the last log; Trainer's seam."""
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        means = {f"{prefix}{name}": torch.stack(seen).mean().item() for name, seen in self._figures.items()}
        self._figures.clear()
        super().log({**logs, **means}, *args, **kwargs)
