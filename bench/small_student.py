"""A small student for speculative benchmarks: some layers of a model, distilled from it for a few minutes.

    python -m bench.small_student --model-path T --layers 2 --output models/small [--minutes 10]

The student keeps the embeddings and ``--layers`` of the blocks, evenly spaced with the first and the last among them.
It reads docstrings of Python's standard library and the teacher's own continuations of them, and learns the teacher's
whole next-token distribution at every position (forward KL, Hinton et al. 2015). Every tenth docstring is held out, for
``bench.speculative``. The recipe is honest rather than good: minutes on a CPU make a student that knows the domain.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.common import positive_int
from bench.texts import prompts

PROMPT, NEW = 48, 80


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--layers", type=positive_int, default=2, help="Default: %(default)s.")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the student.")
    parser.add_argument("--minutes", type=float, default=10.0, help="Of training. Default: %(default)s.")
    parser.add_argument("--continuations", type=positive_int, default=320, help="Default: %(default)s.")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="Sequences a step. Default: %(default)s.")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Default: %(default)s.")
    return parser.parse_args()


def chosen_layers(count: int, of: int) -> list[int]:
    """``count`` block numbers from 0 to ``of`` − 1, evenly spaced."""
    return [0] if count == 1 else [round(i * (of - 1) / (count - 1)) for i in range(count)]


def cut(teacher, layers: int):
    """A copy of ``teacher`` (float32) with fewer blocks."""
    keep = chosen_layers(layers, teacher.config.num_hidden_layers)
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), "num_hidden_layers": layers})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    student = AutoModelForCausalLM.from_config(config).float()
    state = {k: v for k, v in teacher.state_dict().items() if ".layers." not in k}
    for position, layer in enumerate(keep):
        own, theirs = f"model.layers.{position}.", f"model.layers.{layer}."
        state |= {own + k[len(theirs) :]: v for k, v in teacher.state_dict().items() if k.startswith(theirs)}
    student.load_state_dict(state)
    return student


def teacher_texts(path: str, begun: list[list[int]]) -> list[list[int]]:
    """The prompts with the teacher's own sampled continuations, by SGLang."""
    import sglang

    engine = sglang.Engine(model_path=path, max_total_tokens=16384, context_length=1024, log_level="error")
    try:
        params = {"temperature": 1.0, "max_new_tokens": NEW, "ignore_eos": True}
        outputs = engine.generate(input_ids=begun, sampling_params=params)
    finally:
        engine.shutdown()
    return [ids + output["output_ids"] for ids, output in zip(begun, outputs, strict=True)]


def train(teacher, student, sequences: list[list[int]], args: argparse.Namespace, console: Console) -> float:
    """Distil for ``args.minutes``; returns the mean KL, in nats a token, of the last tenth of the steps."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    start, shown, losses = time.monotonic(), 0.0, []
    while (done := (time.monotonic() - start) / 60 / args.minutes) < 1.0:
        ids = torch.tensor(rng.sample(sequences, args.batch_size))
        with torch.no_grad():
            target = log_softmax(teacher(ids).logits, -1).flatten(0, 1)
        got = log_softmax(student(ids).logits, -1).flatten(0, 1)
        loss = kl_div(got, target, log_target=True, reduction="batchmean")
        for group in optimizer.param_groups:
            group["lr"] = (
                args.learning_rate * min(1.0, len(losses) / 20 + 0.05) * (0.05 + 0.95 * math.cos(done * math.pi / 2))
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            console.print(
                f"{done:4.0%}  step {len(losses)}  KL {sum(losses[-20:]) / len(losses[-20:]):.3f} nats a token"
            )
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def main() -> None:
    args, console = parse_args(), Console()
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    begun = prompts(tokenizer, PROMPT, held_out=False)[: args.continuations]
    whole = prompts(tokenizer, PROMPT + NEW, held_out=False)
    console.print(f"{len(begun)} continuations by the teacher …")
    sequences = whole + teacher_texts(args.model_path, begun)
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).eval()
    student = cut(teacher, args.layers).train()
    console.print(f"{len(sequences)} sequences of {PROMPT + NEW} tokens; {args.layers} layers, {args.minutes} minutes")
    kl = train(teacher, student, sequences, args, console)
    student.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    console.print(f"KL at the end {kl:.3f} nats a token; {args.output}")


if __name__ == "__main__":
    main()
