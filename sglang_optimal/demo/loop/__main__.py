"""``python -m sglang_optimal.demo.loop``: does training on the mixture's samples teach the student something?

One server with the small model as teacher and student. Three sets of training data on the same problems, filtered
alike and cut to the same number of tokens: the mixture's, the teacher's alone, the student's own. The student is
fine-tuned on each, put into the running server, and solves held-out problems.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_optimal.demo.loop.evaluate import Accuracy, student_accuracy, update_student
from sglang_optimal.demo.loop.problems import WordProblem, word_problems
from sglang_optimal.demo.prepare_model import DEFAULT_TARGET

ARMS: dict[str, dict[str, Any]] = {
    "mixture": {"alpha_method": "kl_symmetry"},
    "teacher alone": {"fixed_alpha": 1.0},
    "student alone": {"fixed_alpha": 0.0},
}
CONFIG = Path("configs/example_loop.yaml")


@dataclasses.dataclass
class Arm:
    """One set of training data and what came of it.

    Attributes:
        sampled, sampled_tokens: before the filters.
        accepted: rows of the accepted records.
        used, used_tokens: after the cut to the common number of tokens.
        mean_student_logprob: nats a token, of what was used.
        training: figures of the training.
        accuracy: of the trained student.
    """

    name: str
    sampled: int
    sampled_tokens: int
    accepted: list[dict[str, Any]]
    used: int = 0
    used_tokens: int = 0
    mean_student_logprob: float = 0.0
    training: dict[str, float] = dataclasses.field(default_factory=dict)
    accuracy: Accuracy | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang_optimal.demo.loop", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default=str(DEFAULT_TARGET), help="Teacher and student. Default: %(default)s.")
    parser.add_argument("--out", default="runs/example-loop", help="Default: %(default)s; must not have a loop in it.")
    parser.add_argument("--problems", type=int, default=300, help="Training problems. Default: %(default)s.")
    parser.add_argument("--held-out", type=int, default=200, help="Problems to evaluate on. Default: %(default)s.")
    parser.add_argument("--max-tokens", type=int, default=6000, help="Most tokens of a set. Default: %(default)s.")
    parser.add_argument("--epochs", type=float, default=2.0, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of problems, sampling and training. Default: %(default)s.")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("problems", "held_out", "max_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(args, name)}")
    out = Path(args.out)
    if (out / "result.json").exists():
        parser.error(f"--out: {out} has a loop in it; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True)
    asyncio.run(_loop(args, out, console if console.is_terminal else Console(soft_wrap=True, width=130)))
    return 0


async def _loop(args: argparse.Namespace, out: Path, console: Console) -> None:
    from sglang_optimal.distill.server import OwnServer

    began = time.monotonic()
    training = word_problems(args.problems, args.seed)
    held_out = word_problems(args.held_out, args.seed + 1, apart_from=frozenset(p.problem for p in training))
    lines = [json.dumps({"id": f"{i:04d}", **dataclasses.asdict(p)}) for i, p in enumerate(training)]
    (out / "problems.jsonl").write_text("\n".join(lines) + "\n")
    server = {
        "model_path": args.model_path, "context_length": 1024, "max_running_requests": 48, "max_total_tokens": 16384,
        "sleep_on_idle": True,
    }  # fmt: skip
    console.print("starting a server with the model as teacher and as student …")
    async with OwnServer({"student_weights": "separate"}, server, out / "server.log") as running:
        before = await _accuracy(running.url, held_out)
        console.print(f"the student before training solves {before} of {len(held_out)} held-out problems")
        arms = []
        for name, mixing in ARMS.items():
            arm = await asyncio.to_thread(_generate, name, mixing, running.url, out, args.seed, console)
            arms.append(arm)
        _cut(arms, args.max_tokens, out, args.seed)
        for arm in arms:
            console.print(f"{arm.name}: training on {arm.used} samples, {arm.used_tokens} tokens …")
            arm.training = await asyncio.to_thread(_train, arm, args, out)
            folder = str((out / _slug(arm.name) / "model").resolve())
            await asyncio.to_thread(update_student, running.url, folder, _slug(arm.name))
            arm.accuracy = await _accuracy(running.url, held_out)
            console.print(f"{arm.name}: the trained student solves {arm.accuracy}")
    minutes = (time.monotonic() - began) / 60
    _report(before, arms, minutes, out, console)


async def _accuracy(url: str, held_out: list[WordProblem]) -> Accuracy:
    from sglang_optimal.distill.config import load_config

    config = load_config(CONFIG)
    template = config.contexts.student
    assert isinstance(template, str), "the loop's student reads one text"
    return await asyncio.to_thread(student_accuracy, url, held_out, template, config.sampling.max_new_tokens)


def _generate(name: str, mixing: dict[str, Any], url: str, out: Path, seed: int, console: Console) -> Arm:
    from sglang_optimal.distill.config import load_config, parse_config
    from sglang_optimal.distill.pipeline import run
    from sglang_optimal.distill.store import find_shards, read_rows

    folder = out / _slug(name)
    values = load_config(CONFIG).model_dump()
    values["data"]["path"] = str(out / "problems.jsonl")
    values["output"]["dir"] = str(folder)
    values["client"]["endpoints"] = [url]
    values["sampling"]["seed"] = seed
    values["mixing"] = mixing
    console.print(f"{name}: sampling …")
    result = run(parse_config(values, str(CONFIG)), console=console)
    accepted = list(read_rows(find_shards(folder, "accepted")))
    return Arm(name, result.tally.total, result.tally.tokens, accepted)


def _cut(arms: list[Arm], most: int, out: Path, seed: int) -> None:
    """Give every set the same number of tokens, of samples in random order, and write it for the trainer."""
    from sglang_optimal.distill.export import trl_sft

    budget = min(most, *(sum(row["num_tokens"] for row in arm.accepted) for arm in arms))
    for arm in arms:
        rows = sorted(arm.accepted, key=lambda row: row["id"])
        random.Random(seed).shuffle(rows)
        used: list[dict[str, Any]] = []
        for row in rows:
            if arm.used_tokens + row["num_tokens"] <= budget:
                used.append(row)
                arm.used_tokens += row["num_tokens"]
        arm.used = len(used)
        logprob = sum(row["mean_student_logprob"] * row["num_tokens"] for row in used)
        arm.mean_student_logprob = logprob / max(arm.used_tokens, 1)
        path = out / _slug(arm.name) / "train.jsonl"
        path.write_text("".join(json.dumps(trl_sft(row)) + "\n" for row in used))


def _train(arm: Arm, args: argparse.Namespace, out: Path) -> dict[str, float]:
    """In a process of its own, which gives its memory back."""
    folder = out / _slug(arm.name)
    command = [
        sys.executable, "-m", "sglang_optimal.demo.loop.train", "--model-path", args.model_path,
        "--data", str(folder / "train.jsonl"), "--output", str(folder / "model"),
        "--epochs", str(args.epochs), "--seed", str(args.seed),
    ]  # fmt: skip
    with (folder / "train.log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
    if done.returncode:
        raise RuntimeError(f"training failed with status {done.returncode}; see {folder / 'train.log'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _report(before: Accuracy, arms: list[Arm], minutes: float, out: Path, console: Console) -> None:
    from sglang_optimal.distill.report import write_report

    table = Table(title=f"{before.total} held-out problems, solved by the student alone; {minutes:.0f} minutes")
    for name in ("trained on", "accepted", "tokens drawn", "trained: samples", "tokens", "student logprob", "solved"):
        table.add_column(name, justify="left" if name == "trained on" else "right")
    table.add_row("nothing", "", "", "", "", "", str(before))
    for arm in arms:
        table.add_row(
            arm.name, f"{len(arm.accepted)} of {arm.sampled}", f"{arm.sampled_tokens:,}", str(arm.used),
            f"{arm.used_tokens:,}", f"{arm.mean_student_logprob:.2f}", str(arm.accuracy),
        )  # fmt: skip
    console.print(table)
    content = {
        "minutes": round(minutes, 1),
        "before": {"solved": before.solved, "total": before.total, "interval": before.interval()},
        "arms": {
            arm.name: {
                "sampled": arm.sampled, "sampled_tokens": arm.sampled_tokens, "accepted": len(arm.accepted),
                "used": arm.used, "used_tokens": arm.used_tokens, "mean_student_logprob": arm.mean_student_logprob,
                "training": arm.training, "solved": arm.accuracy.solved, "interval": arm.accuracy.interval(),
            }
            for arm in arms
            if arm.accuracy is not None
        },
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(content, indent=2) + "\n")
    for arm in arms:
        console.print(f"report of {arm.name}: {write_report(out / _slug(arm.name))}")


def _slug(name: str) -> str:
    return name.replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
