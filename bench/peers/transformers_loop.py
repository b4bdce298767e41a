"""Mixed sampling as a researcher writes it: two Hugging Face models, two KV caches, one loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from bench.peers import bisect_alpha


class TransformersLoop:
    """Samples from the mixture (``kl_symmetry``), every step a forward of both models.

    Args:
        teacher, student: Hugging Face id or folder; the same twice is loaded once.
        dtype: of both models. device: None: the GPU if there is one.
        random_weights: make the models from their configurations alone, as SGLang's ``--load-format dummy``.
    """

    def __init__(
        self,
        teacher: str,
        student: str,
        dtype: torch.dtype = torch.bfloat16,
        device: str | None = None,
        random_weights: bool = False,
    ):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher = _load(teacher, dtype, self.device, random_weights)
        self.student = self.teacher if student == teacher else _load(student, dtype, self.device, random_weights)

    @torch.inference_mode()
    def generate(
        self,
        teacher_ids: Sequence[Sequence[int]],
        student_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """New tokens of every row, ``max_new_tokens`` each: nothing ends a row early.

        Args:
            teacher_ids, student_ids: the prompts, one of each for a row; lengths may differ.
            temperature: 0 is greedy, with alpha solved at temperature 1.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        teacher = _Context(self.teacher, teacher_ids, self.device)
        student = _Context(self.student, student_ids, self.device)
        tokens: list[Tensor] = []
        for step in range(max_new_tokens):
            if step:
                teacher.append(tokens[-1])
                student.append(tokens[-1])
            log_q = mixture(teacher.logits(), student.logits(), temperature or 1.0)
            if temperature == 0:
                tokens.append(log_q.argmax(-1, keepdim=True))
            else:
                tokens.append(torch.multinomial(log_q.exp(), 1, generator=generator))
        return torch.cat(tokens, dim=-1).tolist()


def generate_alone(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """transformers' own ``generate`` at temperature 1: no mixing. The prompts have one length."""
    ids = torch.tensor(prompts, device=model.device)
    every = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "pad_token_id": 0}
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, **every)
    return output[:, ids.shape[1] :].tolist()


def mixture(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """log q* over the ids that both vocabularies have, [B, V] float32. Logits: [B, V_t], [B, V_s], any float dtype."""
    size = min(teacher_logits.shape[-1], student_logits.shape[-1])
    log_t = torch.log_softmax(teacher_logits[:, :size].float() / temperature, dim=-1)
    log_s = torch.log_softmax(student_logits[:, :size].float() / temperature, dim=-1)
    return torch.log_softmax(torch.lerp(log_s, log_t, bisect_alpha(log_t, log_s)), dim=-1)


class _Context:
    """What one model has read: left-padded rows and their KV cache.

    Args:
        prompts: token ids, one list a row.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], device: str):
        width = max(map(len, prompts))
        # Padding is masked, so that its id means nothing.
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.input_ids, self.mask = ids.to(device), mask.to(device)
        self.position_ids = (self.mask.cumsum(-1) - 1).clamp(min=0)

    def append(self, tokens: Tensor) -> None:
        """One more token a row, [B, 1], for the next forward."""
        self.input_ids = tokens
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=-1)
        self.position_ids = self.position_ids[:, -1:] + 1

    def logits(self) -> Tensor:
        """Logits of every row's next token, [B, V], after a forward of what the cache lacks."""
        output = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _load(path: str, dtype: torch.dtype, device: str, random_weights: bool) -> PreTrainedModel:
    if random_weights:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval()
