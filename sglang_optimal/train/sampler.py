"""The sampler of a trainer that draws its own samples: what is asked of it, and the student's new weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from transformers import TrainerCallback


class Sampler(Protocol):
    """What is asked of a sampler; `sglang_optimal.OptimalSampler` is one."""

    def generate(self, prompts: Any, student_prompts: Any, **sampling: Any) -> Any: ...

    def update_student_weights(self, weights: Mapping[str, torch.Tensor]) -> None: ...


Sampling = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
"""Parameters of ``generate``, or a function of the optimizer steps that are done, which gives those of the next one:
a KL budget that falls (TRB, arXiv 2605.31159)."""


def sampling_at(sampling: Sampling | None, step: int) -> dict[str, Any]:
    """The parameters of ``generate`` after ``step`` optimizer steps.

    Raises:
        ValueError: the function gives something else.
    """
    given = sampling(step) if callable(sampling) else {} if sampling is None else sampling
    if not isinstance(given, Mapping):
        raise ValueError(f"sampling: must be a mapping, or a function of the step that gives one; got {given!r}.")
    return dict(given)


def with_series(sampling: Mapping[str, Any], series: list[str]) -> dict[str, Any]:
    """Parameters of ``generate`` that ask for these series, and for what the student read, as well."""
    custom = {**(sampling.get("custom_params") or {}), "return_prompts": True}
    return {**sampling, "custom_params": custom, "return_mixing_info": series}


def check_sample(result: Any) -> None:
    """Raise RuntimeError for a sample that was aborted, or has no tokens."""
    if result.finish_reason == "abort" or not result.token_ids:
        raise RuntimeError(f"sampler: a sample ended with {result.finish_reason!r}, {len(result.token_ids)} tokens.")


class SamplerUpdates(TrainerCallback):
    """Updates the sampler before the first step and after every ``update_every``."""

    def __init__(self, trainer: Any, update_every: int):
        self.trainer, self.update_every = trainer, update_every

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.update_sampler()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.update_every == 0:
            self.trainer.update_sampler()


def give_weights(sampler: Sampler, model: Any) -> None:
    """Give the sampler a model's weights, by the names that its checkpoints have.

    A peft model is merged in a copy: merging and unmerging in place would round 16-bit weights anew at every step. Of
    a sampler whose student is an adapter it is the adapter alone.

    Raises:
        ValueError: the model has no adapter then.
    """
    if getattr(sampler, "student_is_adapter", False):
        if not hasattr(model, "peft_config"):
            raise ValueError("model: the sampler's student is an adapter of the teacher; give a peft model.")
        from peft import get_peft_model_state_dict

        return sampler.update_student_weights(get_peft_model_state_dict(model))
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    sampler.update_student_weights(_as_saved(model, tensors))


def _as_saved(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``save_pretrained`` would write: some models hold in one tensor what their checkpoints have in many."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4, where they do not
        return tensors
    return revert_weight_conversion(model, tensors)
