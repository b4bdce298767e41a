"""Arguments of both trainers."""

from __future__ import annotations

import dataclasses

from transformers import TrainingArguments

from sglang_optimal.train.checks import check_choice
from sglang_optimal.train.objective import Objective

BATCH_REDUCTIONS = ("token", "sequence")


@dataclasses.dataclass
class TrainConfig(TrainingArguments):
    """transformers' TrainingArguments, and what is trained on; see `Objective` for the fields that are also there.

    Attributes:
        loss, beta, top_k_ids, weights_towards, weight_level, max_weight: of the `Objective`.
        loss_reduction: ``token``: every token of a step weighs the same, over accumulated batches too. ``sequence``:
            every sequence does.
        sampling_temperature, behaviour, max_length: of the `RecordCollator` (``temperature`` there).
        vocab_size: cut the student's logits to the ids that teacher and student have in common, where the student's are
            padded further; None: as they are.
        update_every: of `RolloutTrainer`: optimizer steps between updates of the sampler's student.

    Raises:
        ValueError: names the field.
    """

    loss: str = dataclasses.field(default="importance_sft", metadata={"help": "What is minimised."})
    beta: float = dataclasses.field(default=0.5, metadata={"help": "Of jsd: 0 is the forward, 1 the reverse KL."})
    top_k_ids: str | None = dataclasses.field(default=None, metadata={"help": "Whose top k divergences are taken at."})
    weights_towards: str = dataclasses.field(default="teacher", metadata={"help": "Of importance_sft."})
    weight_level: str = dataclasses.field(default="token", metadata={"help": "Of importance_sft: token or sequence."})
    max_weight: float | None = dataclasses.field(default=10.0, metadata={"help": "The largest weight or ratio."})
    loss_reduction: str = dataclasses.field(default="token", metadata={"help": "token or sequence."})
    sampling_temperature: float | None = dataclasses.field(default=None, metadata={"help": "Of the requests."})
    behaviour: str | None = dataclasses.field(default=None, metadata={"help": "Column of what drew the tokens."})
    max_length: int | None = dataclasses.field(default=None, metadata={"help": "Refuse longer records."})
    vocab_size: int | None = dataclasses.field(default=None, metadata={"help": "Ids that both models have."})
    update_every: int = dataclasses.field(default=1, metadata={"help": "Steps between updates of the sampler."})

    def __post_init__(self):
        super().__post_init__()
        self.objective()  # checks its fields
        check_choice("loss_reduction", self.loss_reduction, BATCH_REDUCTIONS)
        if self.update_every < 1:
            raise ValueError(f"update_every: must be at least 1, got {self.update_every}.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size: must be at least 1, got {self.vocab_size}.")
        # The columns that the loss needs are not arguments of the model.
        self.remove_unused_columns = False

    def objective(self) -> Objective:
        return Objective(
            self.loss,
            beta=self.beta,
            top_k_ids=self.top_k_ids,
            weights_towards=self.weights_towards,
            weight_level=self.weight_level,
            max_weight=self.max_weight,
        )
