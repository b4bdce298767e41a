"""How far the nested design's distribution is from q*, on real text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.peers.nested import TOP, truncated_mixture
from bench.peers.transformers_loop import TransformersLoop
from sglang_optimal.demo.problems import Problem
from sglang_optimal.mixing import AlphaParams, mix


@dataclasses.dataclass
class Distance:
    """Per position, [N] float32 each.

    Attributes:
        total_variation: between q* and what the nested design samples from.
        mass_outside: q*'s mass on tokens that the nested design can never sample.
        alpha_difference: absolute.
    """

    total_variation: Tensor
    mass_outside: Tensor
    alpha_difference: Tensor

    def summary(self) -> dict[str, float]:
        return {
            "positions": self.total_variation.numel(),
            "total_variation_mean": self.total_variation.mean().item(),
            "total_variation_max": self.total_variation.max().item(),
            "mass_outside_mean": self.mass_outside.mean().item(),
            "mass_outside_max": self.mass_outside.max().item(),
            "alpha_difference_mean": self.alpha_difference.mean().item(),
        }


@torch.inference_mode()
def measure(teacher: str, student: str, problems: Sequence[Problem], max_new_tokens: int, seed: int) -> Distance:
    """At every position of answers that are sampled from q* itself, one a problem, until their end of text.

    Both models in float32, at temperature 1. The teacher's prompt has the solution, the student's has not.
    """
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    loop = TransformersLoop(teacher, student, dtype=torch.float32)
    teacher_ids = [_prompt(tokenizer, problem.teacher_prompt) for problem in problems]
    student_ids = [_prompt(tokenizer, problem.student_prompt) for problem in problems]
    answers = loop.generate(teacher_ids, student_ids, max_new_tokens, temperature=1.0, seed=seed)
    parts = []
    for for_teacher, for_student, answer in zip(teacher_ids, student_ids, answers, strict=True):
        if tokenizer.eos_token_id in answer:
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        parts.append(_compare(_logits(loop.teacher, for_teacher, answer), _logits(loop.student, for_student, answer)))
    columns = [field.name for field in dataclasses.fields(Distance)]
    return Distance(*(torch.cat([getattr(part, name) for part in parts]) for name in columns))


def _compare(teacher_logits: Tensor, student_logits: Tensor) -> Distance:
    """Logits: [N, V_t], [N, V_s] float32."""
    # The student's server knows nothing of the teacher's vocabulary: its log-probabilities are over its own.
    top_logprobs, top_ids = torch.log_softmax(student_logits, dim=-1).topk(TOP, dim=-1)
    log_nested, nested_alpha = truncated_mixture(teacher_logits, top_ids, top_logprobs)
    rows, size = teacher_logits.shape[0], min(teacher_logits.shape[-1], student_logits.shape[-1])
    params = AlphaParams.uniform(rows, device=teacher_logits.device)
    temperature = torch.ones(rows, device=teacher_logits.device)
    exact = mix(teacher_logits[:, :size], student_logits[:, :size], temperature, params)
    q = torch.softmax(exact.logits, dim=-1)
    return Distance(
        total_variation=(q - log_nested[:, :size].exp()).abs().sum(-1).cpu() / 2,
        mass_outside=(1 - q.gather(-1, top_ids).sum(-1)).clamp(min=0).cpu(),
        alpha_difference=(exact.alpha - nested_alpha.squeeze(-1)).abs().cpu(),
    )


def _logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """What the model says before each token of ``answer``, [len(answer), V] float32."""
    ids = torch.tensor([prompt + answer[:-1]], device=model.device)
    return model(ids, logits_to_keep=len(answer)).logits[0]


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` as a user message; as it is for models without a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(rendered, add_special_tokens=False)
