"""Small students for speculative benchmarks: some layers of a model, distilled from it for a few minutes.

    python -m bench.small_student --model-path T --layers 4 3 --output models/small [--minutes 18]

A student keeps the embeddings and some of the blocks, evenly spaced with the first and the last among them. It learns
from what semi on-policy distillation is for: texts are sampled from the mixture of the teacher that is told the worked
solution of a word problem and the teacher that is not, and the student learns the whole next-token distribution of the
latter at every token of them (forward KL, Hinton et al. 2015). ``bench.speculative`` measures on other problems. The
recipe is honest rather than good: minutes on a CPU make a student that knows this domain alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.common import positive_int
from sglang_optimal.demo.loop.problems import WordProblem, word_problems

TRAIN_SEED, BENCH_SEED = 11, 12


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--layers", type=positive_int, nargs="+", default=[4, 3], help="One student each.")
    parser.add_argument("--output", required=True, help="Folder of the students; the number of layers is added.")
    parser.add_argument("--minutes", type=float, default=18.0, help="Training of each. Default: %(default)s.")
    parser.add_argument("--problems", type=positive_int, default=2000, help="Default: %(default)s.")
    parser.add_argument("--new-tokens", type=positive_int, default=72, help="Of each text. Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=0.8, help="Of the texts. Default: %(default)s.")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="Texts a step. Default: %(default)s.")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="Default: %(default)s.")
    return parser.parse_args()


def contexts(tokenizer, problem: WordProblem) -> tuple[list[int], list[int]]:
    """(teacher, student): the chat with the worked solution in it, and without."""
    hint = f"{problem.problem}\n\nThe solution is: {problem.solution}\nExplain it in your own words."
    return tuple(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in (hint, problem.problem)
    )


def held_out(tokenizer, count: int = 200) -> list[tuple[list[int], list[int]]]:
    """Contexts of problems that no student has been distilled on."""
    seen = frozenset(problem.problem for problem in word_problems(2000, TRAIN_SEED))
    return [contexts(tokenizer, problem) for problem in word_problems(count, BENCH_SEED, apart_from=seen)]


def sampled_texts(args: argparse.Namespace, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(student context, text) of each problem; sampled from the mixture, with the teacher on both sides."""
    from sglang_optimal import OptimalSampler

    pairs = [contexts(tokenizer, problem) for problem in word_problems(args.problems, TRAIN_SEED)]
    arguments = {"max_total_tokens": 16384, "context_length": 1024, "max_running_requests": 32, "log_level": "error"}
    with OptimalSampler(args.model_path, **arguments) as sampler:
        results = sampler.generate(
            [teacher for teacher, _ in pairs],
            [student for _, student in pairs],
            temperature=args.temperature,
            max_new_tokens=args.new_tokens,
        )
    return [(student, result.token_ids) for (_, student), result in zip(pairs, results, strict=True)]


def half() -> torch.autocast:
    """Matrix products in bfloat16, in which both models will run, and which some CPUs do three times as fast."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def cut(teacher, layers: int):
    """A copy of ``teacher`` (float32) with ``layers`` of its blocks."""
    last = teacher.config.num_hidden_layers - 1
    keep = [0] if layers == 1 else [round(i * last / (layers - 1)) for i in range(layers)]
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), "num_hidden_layers": layers})
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    student = AutoModelForCausalLM.from_config(config).float()
    whole = teacher.state_dict()
    state = {k: v for k, v in whole.items() if ".layers." not in k}
    for position, layer in enumerate(keep):
        own, theirs = f"model.layers.{position}.", f"model.layers.{layer}."
        state |= {own + k[len(theirs) :]: v for k, v in whole.items() if k.startswith(theirs)}
    student.load_state_dict(state)
    return student


class Texts:
    """What is learned from: ids, where the texts are, and the teacher's last hidden states there."""

    def __init__(self, teacher, texts: list[tuple[list[int], list[int]]]):
        self.ids = [torch.tensor(context + text) for context, text in texts]
        # The token at p is predicted at p − 1.
        self.places = [torch.arange(len(c) - 1, len(c) + len(t) - 1) for c, t in texts]
        self.hidden: list[torch.Tensor] = []
        for start in range(0, len(texts), 16):
            part = range(start, min(start + 16, len(texts)))
            states = self.states(teacher, list(part)).split([len(self.places[i]) for i in part])
            self.hidden += [one.clone() for one in states]

    def states(self, model, chosen: list[int]) -> torch.Tensor:
        """Last hidden states [tokens of the texts, width] of the chosen texts."""
        grad = torch.enable_grad() if model.training else torch.no_grad()
        with grad, half():
            ids = pad_sequence([self.ids[i] for i in chosen], batch_first=True)
            states = model.model(ids, use_cache=False).last_hidden_state
        return torch.cat([states[row, self.places[i]] for row, i in enumerate(chosen)])


def train(teacher, student, texts: Texts, args: argparse.Namespace, console: Console) -> float:
    """Distil for ``args.minutes``; returns the mean KL, in nats a token, of the last tenth of the steps."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    start, shown, losses, order = time.monotonic(), 0.0, [], []
    while (done := (time.monotonic() - start) / 60 / args.minutes) < 1.0:
        if len(order) < args.batch_size:
            order = rng.sample(range(len(texts.ids)), len(texts.ids))
        chosen = [order.pop() for _ in range(args.batch_size)]
        with torch.no_grad(), half():
            target = log_softmax(teacher.lm_head(torch.cat([texts.hidden[i] for i in chosen])).float(), -1)
        with half():
            got = log_softmax(student.lm_head(texts.states(student, chosen)).float(), -1)
        loss = kl_div(got, target, log_target=True, reduction="batchmean")
        for group in optimizer.param_groups:
            warm = min(1.0, (len(losses) + 1) / 20)
            group["lr"] = args.learning_rate * warm * (0.05 + 0.95 * math.cos(done * math.pi / 2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            console.print(
                f"{done:4.0%}  step {len(losses)}  KL {sum(losses[-10:]) / len(losses[-10:]):.3f} nats a token"
            )
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def main() -> None:
    args, console = parse_args(), Console()
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    start = time.monotonic()
    kept = Path(f"{args.output}-texts.json")
    if kept.exists():
        sampled = json.loads(kept.read_text())
    else:
        sampled = sampled_texts(args, tokenizer)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(sampled))
    count = sum(len(text) for _, text in sampled)
    console.print(f"{len(sampled)} texts, {count} tokens, at {time.monotonic() - start:.0f} s; kept in {kept}")
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).eval()
    texts = Texts(teacher, sampled)
    console.print(f"read by the teacher at {time.monotonic() - start:.0f} s")
    for layers in args.layers:
        student = cut(teacher, layers).train()
        kl = train(teacher, student, texts, args, console)
        output = Path(f"{args.output}-{layers}")
        student.to(torch.bfloat16).save_pretrained(output)
        tokenizer.save_pretrained(output)
        console.print(f"{layers} layers: KL at the end {kl:.3f} nats a token; {output}")


if __name__ == "__main__":
    main()
