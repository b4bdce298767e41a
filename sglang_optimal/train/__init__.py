"""What a trainer makes of mixed samples: losses on series and top-k arrays, and three small trainers.

Needs PyTorch alone; the trainers need transformers, and GRPO TRL. Nothing of SGLang is imported. docs/training.md says
which series is which mathematical object.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sglang_optimal.train.bounds import DIVERGENCES, Bounds, divergence_bounds
from sglang_optimal.train.distributions import TAIL_RESOLUTION, mixture_logits, sampled_logprobs
from sglang_optimal.train.importance import ImportanceWeights, importance_weights, weighted_nll
from sglang_optimal.train.losses import forward_kl, generalised_jsd, mixture_kl, reverse_kl
from sglang_optimal.train.objective import LOSSES, Objective
from sglang_optimal.train.policy_gradient import policy_gradient_loss
from sglang_optimal.train.records import RecordCollator
from sglang_optimal.train.reduction import REDUCTIONS, reduce
from sglang_optimal.train.top_k import TopK

if TYPE_CHECKING:
    from sglang_optimal.train.config import TrainConfig
    from sglang_optimal.train.grpo import MixtureGRPOTrainer
    from sglang_optimal.train.record_trainer import RecordTrainer
    from sglang_optimal.train.rollout_trainer import RolloutTrainer

_MODULES = {
    "MixtureGRPOTrainer": "grpo",
    "RecordTrainer": "record_trainer",
    "RolloutTrainer": "rollout_trainer",
    "TrainConfig": "config",
}

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "REDUCTIONS",
    "TAIL_RESOLUTION",
    "Bounds",
    "ImportanceWeights",
    "MixtureGRPOTrainer",
    "Objective",
    "RecordCollator",
    "RecordTrainer",
    "RolloutTrainer",
    "TopK",
    "TrainConfig",
    "divergence_bounds",
    "forward_kl",
    "generalised_jsd",
    "importance_weights",
    "mixture_kl",
    "mixture_logits",
    "policy_gradient_loss",
    "reduce",
    "reverse_kl",
    "sampled_logprobs",
    "weighted_nll",
]


def __getattr__(name: str):
    # transformers takes seconds to import, and a loss does not need it.
    if name in _MODULES:
        return getattr(importlib.import_module(f"sglang_optimal.train.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
