"""One student trained on rows, for a fixed number of steps, and what it writes by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from bench.proof.scales import Scale
from bench.proof.tasks import QUESTION
from sglang_optimal.demo.loop.problems import WordProblem
from sglang_optimal.train import RecordTrainer, TrainConfig

LONGEST = 512
"""Tokens of a prompt and its sample."""


def load(path: str | Path, scale: Scale) -> tuple[Any, Any]:
    """(model, tokenizer), float32 on a CPU, bfloat16 else."""
    disable_progress_bar()
    dtype = torch.float32 if scale.device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype).to(scale.device)
    return model, AutoTokenizer.from_pretrained(str(path))


def prompt_ids(tokenizer: Any, problem: WordProblem) -> list[int]:
    """What the student reads of a problem, chat template and all."""
    messages = [{"role": "user", "content": QUESTION.format(problem=problem.problem)}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def solution_rows(tokenizer: Any, problems: Sequence[WordProblem]) -> list[dict[str, list[int]]]:
    """Plain SFT: the worked solutions themselves, with an end token."""
    end = [tokenizer.eos_token_id]
    return [
        {
            "prompt_ids": prompt_ids(tokenizer, problem),
            "completion_ids": tokenizer(problem.solution, add_special_tokens=False)["input_ids"] + end,
        }
        for problem in problems
    ]


def trained(
    model: Any, rows: Sequence[dict[str, Any]], scale: Scale, folder: Path, *, steps: int, seed: int, loss: str = "sft"
) -> tuple[Any, dict[str, float]]:
    """Train a LoRA adapter, and merge it.

    Args:
        model: of `load`; it is used up.
        rows: what `RecordTrainer` reads: ``prompt_ids`` and ``completion_ids``, or records.
        steps: of the optimizer, with the scale's batch, whatever the number of rows.
        loss: of `sglang_optimal.train.LOSSES`.

    Returns:
        (the merged model, {"steps", "train_loss", "train_seconds"}).

    Raises:
        ValueError: no rows, or rows without what the loss needs.
    """
    if not rows:
        raise ValueError("rows: there is nothing to train on.")
    torch.manual_seed(seed)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = RecordTrainer(
        get_peft_model(model, adapter),
        TrainConfig(
            output_dir=str(folder), loss=loss, max_steps=steps, per_device_train_batch_size=scale.batch,
            learning_rate=scale.learning_rate, lr_scheduler_type="cosine", warmup_steps=max(1, steps // 6), seed=seed,
            sampling_temperature=scale.temperature, max_length=LONGEST, report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=scale.device == "cpu",
        ),
        Dataset.from_list(list(rows)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    done = trainer.train()
    figures = {"steps": done.global_step, "train_loss": done.training_loss}
    return trainer.model.merge_and_unload(), figures | {"train_seconds": round(time.monotonic() - began, 1)}


@torch.inference_mode()
def answers(
    model: Any, tokenizer: Any, problems: Sequence[WordProblem], scale: Scale, max_new_tokens: int
) -> list[str]:
    """The greedy texts of the student alone."""
    model.eval()
    prompts = [prompt_ids(tokenizer, problem) for problem in problems]
    texts: list[list[int]] = [[] for _ in prompts]
    # A batch lasts as long as its longest text: the few long ones go on together, in a batch of their own.
    most = max(1, max_new_tokens * 5 // 8)
    unfinished = list(range(len(prompts)))
    while unfinished:
        so_far = [prompts[i] + texts[i] for i in unfinished]
        written = [
            text
            for start in range(0, len(so_far), scale.generate)
            for text in _continued(model, so_far[start : start + scale.generate], most, tokenizer.eos_token_id)
        ]
        for i, text in zip(unfinished, written, strict=True):
            texts[i] += text
        ended = {i for i in unfinished if texts[i][-1] == tokenizer.eos_token_id or len(texts[i]) >= max_new_tokens}
        unfinished = [i for i in unfinished if i not in ended]
        most = max_new_tokens - most
    return tokenizer.batch_decode(texts, skip_special_tokens=True)


def _continued(model: Any, prompts: Sequence[list[int]], most: int, end: int) -> list[list[int]]:
    """What the model writes after each, up to its end token, or ``most`` tokens."""
    longest = max(map(len, prompts))
    ids = [[end] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    written = model.generate(
        input_ids=torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False, max_new_tokens=most, pad_token_id=end,
    )  # fmt: skip
    rows = written[:, longest:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """As a checkpoint for a server, in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
