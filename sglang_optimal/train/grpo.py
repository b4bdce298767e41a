"""TRL's GRPO with rollouts from the mixture: the student explores beside a teacher that may see more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl import GRPOTrainer

from sglang_optimal.train.sampler import (
    Sampler,
    SamplerUpdates,
    Sampling,
    check_sample,
    give_weights,
    sampling_at,
    with_series,
)


class MixtureGRPOTrainer(GRPOTrainer):
    """GRPO whose samples are drawn from q* ∝ π_student^(1−α)·π_teacher^α, with the importance weights that asks for.

    TRL takes the log-probabilities that a ``rollout_func`` returns for the policy's own, and corrects for another
    behaviour policy only with vLLM. Here they are the behaviour's, log q* of each token as it was drawn, and take the
    place of the old policy's: every ratio of the loss is π_student/q*. ``loss_type="vespo"`` was made for such samples;
    the clipped losses (``grpo``, ``dapo``, …) clip around q*, so that tokens which q* changed much have no gradient.

    Args:
        *args, **more: of `trl.GRPOTrainer`. Rows of ``train_dataset`` have, beside the student's ``prompt``, the
            teacher's ``teacher_prompt`` (text, messages or token ids). Both are read as `OptimalSampler` reads them.
        sampler: an `OptimalSampler` whose student has weights of its own (another model, or
            ``student_weights="separate"``).
        sampling: parameters of its ``generate``, alpha's among them, or a function of the optimizer steps that are
            done, which gives them: a ``kl_budget`` that falls. Length, temperature, top-p, top-k and min-p are those of
            ``args``.
        update_every: optimizer steps between updates of the sampler's student; it also gets the weights before the
            first one.

    Raises:
        ValueError: ``use_vllm``, a ``rollout_func``, or a parameter that ``args`` has.
    """

    def __init__(
        self,
        *args: Any,
        sampler: Sampler,
        sampling: Sampling | None = None,
        update_every: int = 1,
        **more: Any,
    ):
        if more.get("rollout_func") is not None:
            raise ValueError("rollout_func: the sampler draws the rollouts; leave it out.")
        super().__init__(*args, **{**more, "rollout_func": _rollouts})
        if self.args.use_vllm:
            raise ValueError("use_vllm: the sampler draws the rollouts; leave it out.")
        if update_every < 1:
            raise ValueError(f"update_every: must be at least 1, got {update_every}.")
        self.sampler, self.update_every = sampler, update_every
        first = self._checked(sampling_at(sampling, 0))  # refused before the first step
        self.sampling = sampling if callable(sampling) else first
        self._rows: Sequence[Mapping[str, Any]] = ()
        self.add_callback(SamplerUpdates(self, update_every))

    def _checked(self, sampling: dict[str, Any]) -> dict[str, Any]:
        for name in self._of_args():
            if name in sampling:
                raise ValueError(f"sampling: {name} is args' ({type(self.args).__name__}); set it there.")
        return sampling

    def _of_args(self) -> dict[str, Any]:
        given = self.args
        top_k, min_p = given.top_k or 0, given.min_p
        return {
            "max_new_tokens": given.max_completion_length,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "top_k": top_k if top_k > 0 else -1,
            "min_p": 0.0 if min_p is None else min_p,
        }

    def update_sampler(self) -> None:
        """Give the sampler the student's present weights, an adapter merged."""
        give_weights(self.sampler, self.accelerator.unwrap_model(self.model))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's; the old policy is the one that drew the tokens."""
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"] = output["sampling_per_token_logps"]
        return output

    def rollouts(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What TRL asks of a ``rollout_func``: one sample for each prompt, as many in a row as a group has.

        Raises:
            ValueError: a row has no ``teacher_prompt``.
            RuntimeError: a sample was aborted, or has no tokens.
        """
        if any(row.get("teacher_prompt") is None for row in self._rows):
            raise ValueError("teacher_prompt: every row of the dataset needs one; the teacher reads it.")
        sampling = self._checked(sampling_at(self.sampling, self.state.global_step))
        asked = with_series({**sampling, **self._of_args()}, ["behaviour_logprob"])
        results = self.sampler.generate([row["teacher_prompt"] for row in self._rows], list(prompts), **asked)
        for result in results:
            check_sample(result)
        return {
            "prompt_ids": [result.meta_info["student_prompt_ids"] for result in results],
            "completion_ids": [result.token_ids for result in results],
            "logprobs": [result.mixing_info["behaviour_logprob"] for result in results],
        }


def _rollouts(prompts: list[Any], trainer: MixtureGRPOTrainer) -> dict[str, Any]:
    return trainer.rollouts(prompts)
