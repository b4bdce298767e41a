"""verl: an agent loop whose turn is drawn from the mixture, in verl's own SGLang servers.

Name it in the data (column ``agent_name``: ``mixture_agent``) and let verl import this file
(``actor_rollout_ref.rollout.agent.agent_loop_config_path``), with ``SGLANG_OPTIMAL_CONFIG`` in the servers'
environment. What the teacher reads is in each row's ``extra_info.teacher_prompt`` (messages), as ``distill export
--format verl`` writes it; ``extra_info.mixing`` may hold alpha's settings. With ``rollout.calculate_log_probs`` the
rollout's log-probabilities are log q*, those of the behaviour policy, for ``algorithm.rollout_correction``.

Written against verl's interface of ``verl/experimental/agent_loop/single_turn_agent_loop.py``; see docs/trainers.md for
what was run.
"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register


@register("mixture_agent")
class MixtureAgentLoop(AgentLoopBase):
    """One turn, sampled between the policy and a teacher that reads another prompt."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Draw one answer.

        Raises:
            ValueError: the row's ``extra_info`` has no ``teacher_prompt``.
        """
        extra = kwargs.get("extra_info") or {}
        if not extra.get("teacher_prompt"):
            raise ValueError("extra_info: has no teacher_prompt; export the data with --format verl.")
        prompt_ids, teacher_ids = [
            await self.loop.run_in_executor(None, self._ids, list(messages))
            for messages in (kwargs["raw_prompt"], extra["teacher_prompt"])
        ]
        custom = {**(extra.get("mixing") or {}), "teacher_input_ids": teacher_ids}
        output = await self.server_manager.generate(
            request_id=uuid4().hex,
            prompt_ids=prompt_ids,
            sampling_params={**sampling_params, "custom_params": custom},
        )
        longest = self.config.actor_rollout_ref.rollout.response_length
        response_ids = list(getattr(output, "token_ids", output))[:longest]
        logprobs = getattr(output, "log_probs", None)
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            response_logprobs=None if logprobs is None else list(logprobs)[:longest],
            num_turns=2,
            metrics={},
        )

    def _ids(self, messages: list[dict[str, Any]]) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
