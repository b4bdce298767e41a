"""A sampler without an engine: two transformers models, mixed token by token with `sglang_optimal.mixing`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sglang_optimal.mixing import AlphaParams, mix
from sglang_optimal.train import TopK

VOCAB = 64


@dataclasses.dataclass
class Result:
    """Of `GenerationResult` what a trainer reads."""

    token_ids: list[int]
    finish_reason: str | None
    mixing_info: dict[str, Any]
    meta_info: dict[str, Any]
    index: int


class FakeSampler:
    """Has the two methods of `OptimalSampler` that `RolloutTrainer` uses; in float32, ``top_k`` arrays on request."""

    def __init__(
        self,
        teacher: str | Path,
        student: str | Path,
        *,
        top_k: int = 8,
        returns_prompts: bool = True,
        tells_behaviour: bool = True,
    ):
        self.teacher, self.student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (teacher, student))
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
        self.top_k, self.returns_prompts, self.tells_behaviour = top_k, returns_prompts, tells_behaviour
        self.updates = 0
        self.calls: list[dict[str, Any]] = []

    def __enter__(self):
        return self

    def __exit__(self, *info) -> None:
        pass

    def update_student_weights(self, weights: str | Mapping[str, torch.Tensor]) -> None:
        tensors = load_file(Path(weights) / "model.safetensors") if isinstance(weights, str) else weights
        missing, unexpected = self.student.load_state_dict(tensors, strict=False)
        assert not missing and not unexpected
        self.updates += 1

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    @torch.no_grad()
    def generate(
        self, prompts, student_prompts, *, max_new_tokens=4, temperature=1.0, n=1, custom_params=None,
        return_mixing_info=False, seed=None, **sampling,
    ):  # fmt: skip
        self.calls.append({"custom_params": custom_params, "temperature": temperature, **sampling})
        generator = torch.Generator().manual_seed(len(self.calls) if seed is None else seed)
        results = []
        for index, (teacher, student) in enumerate(zip(prompts, student_prompts, strict=True)):
            read = [torch.tensor([self.ids(prompt)] * n) for prompt in (teacher, student)]
            series: dict[str, list[Any]] = {}
            tokens: list[torch.Tensor] = []
            for _ in range(max_new_tokens):
                t, s = (
                    model(torch.cat([ids, *tokens], -1)).logits[:, -1, :VOCAB]
                    for model, ids in zip((self.teacher, self.student), read, strict=True)
                )
                made = mix(
                    t, s, torch.full((n,), temperature), AlphaParams.uniform(n, "kl_symmetry"), implementation="torch"
                )
                logits = {"teacher": t, "student": s, "mixture": made.logits}
                logprobs = {name: (values / temperature).log_softmax(-1) for name, values in logits.items()}
                tokens.append(torch.multinomial(logprobs["mixture"].exp(), 1, generator=generator))
                found = step(logprobs, tokens[-1], self.top_k)
                if self.tells_behaviour:
                    found["behaviour_logprob"] = found["mixture_logprob"]
                for name, values in found.items():
                    series.setdefault(name, []).append(values)
                series.setdefault("alpha", []).append(made.alpha)
                series.setdefault("kl_to_student", []).append(made.kl_to_student)
            for i in range(n):
                info = {name: torch.stack([value[i] for value in values]).tolist() for name, values in series.items()}
                meta = {"student_prompt_ids": read[1][i].tolist()} if self.returns_prompts else {}
                drawn = torch.cat(tokens, -1)[i].tolist()
                results.append(Result(drawn, "length", info if return_mixing_info else {}, meta, index))
        return results


def step(logprobs: dict[str, torch.Tensor], token: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """The series and top-k arrays of one token."""
    found = {f"{name}_logprob": values.gather(-1, token).squeeze(-1) for name, values in logprobs.items()}
    for at, likeliest in logprobs.items():
        ids = likeliest.topk(k).indices
        found[f"top_k_{at}_ids"] = ids
        for of, values in logprobs.items():
            top_k = TopK.from_logits(values, ids=ids)
            found[f"top_k_{at}_{of}_logprobs"], found[f"top_k_{at}_{of}_tail"] = top_k.logprobs, top_k.tail
    return found
