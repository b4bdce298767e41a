"""Throughput of mixed sampling beside its limit, all rates taken in one run.

    python bench/throughput.py --model-path T [--student-model-path S] [--batch-sizes 1 8 32] [--output FILE.json]

Rates, in generated tokens a second over whole calls (prefill included, nothing cached):

    stock  SGLang's own engine with the teacher
    t      plain requests on our engine (the teacher alone)
    s      the student alone, on SGLang's own engine
    m      mixed requests on our engine, student and teacher each with weights of their own
    2t     plain requests on SGLang's own engine, twice as many, half of them with the student's prompts
    shared mixed requests on our engine with shared weights (only where both models are one)

L = 1 / (1/t + 1/s) is the limit for two models in lockstep, 2t/2 that of shared weights. The engines live side by side,
idle ones asleep, and the rounds go through them in random order, so that a machine's drift hits all alike; ratios are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sglang_optimal import OptimalSampler
from sglang_optimal.mixing import AlphaParams, mix, token_logprobs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--student-model-path", help="Default: the teacher.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5, help="Default: %(default)s.")
    parser.add_argument("--teacher-tokens", type=int, default=96, help="Prompt length. Default: %(default)s.")
    parser.add_argument("--student-tokens", type=int, default=64, help="Prompt length. Default: %(default)s.")
    parser.add_argument("--new-tokens", type=int, default=64, help="Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Default: %(default)s.")
    parser.add_argument("--max-total-tokens", type=int, default=16384, help="KV pool of each engine.")
    parser.add_argument("--mem-fraction-static", type=float, default=None, help="SGLang's flag, for each engine.")
    parser.add_argument("--output", type=Path, help="Write every round's rates as JSON.")
    return parser.parse_args()


class Bench:
    """The engines and one timed call on each.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace):
        import sglang

        self.args = args
        self.rng = random.Random(0)
        arguments = {
            "max_total_tokens": args.max_total_tokens,
            "context_length": 2048,
            "max_running_requests": 2 * max(args.batch_sizes),
            "sleep_on_idle": True,
            "log_level": "error",
        }
        if args.mem_fraction_static is not None:
            arguments["mem_fraction_static"] = args.mem_fraction_static
        student = args.student_model_path or args.model_path
        self.stock = sglang.Engine(model_path=args.model_path, **arguments)
        # One model for both: its own engine serves as the student's.
        self.alone = self.stock if student == args.model_path else sglang.Engine(model_path=student, **arguments)
        self.mixed = OptimalSampler(args.model_path, student, student_weights="separate", **arguments)
        self.shared = OptimalSampler(args.model_path, **arguments) if self.alone is self.stock else None
        self.vocab_size = len(self.stock.tokenizer_manager.tokenizer)

    def close(self) -> None:
        for sampler in filter(None, (self.mixed, self.shared)):
            sampler.shutdown()
        if self.alone is not self.stock:
            self.alone.shutdown()
        self.stock.shutdown()

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        return [[self.rng.randrange(100, self.vocab_size) for _ in range(length)] for _ in range(batch)]

    def rate(self, engine, batch: int, length: int, student_length: int | None = None, second: int = 0) -> float:
        """Generated tokens a second of one call with ``batch`` fresh prompts, and as many of length ``second``."""
        args = self.args
        params = {"temperature": args.temperature, "max_new_tokens": args.new_tokens, "ignore_eos": True}
        each = [dict(params) for _ in range(batch)]
        if student_length is not None:
            for one, ids in zip(each, self.prompts(batch, student_length), strict=True):
                one["custom_params"] = {"student_input_ids": ids}
        ids = self.prompts(batch, length)
        if second:
            ids, each = ids + self.prompts(batch, second), each * 2
        start = time.perf_counter()
        outputs = engine.generate(input_ids=ids, sampling_params=each)
        seconds = time.perf_counter() - start
        tokens = sum(len(output["output_ids"]) for output in outputs)
        assert tokens == len(ids) * args.new_tokens, "the pools are too small for this batch"
        return tokens / seconds

    def round(self, batch: int) -> dict[str, float]:
        t_len, s_len = self.args.teacher_tokens, self.args.student_tokens
        calls: list[tuple[str, Callable[[], float]]] = [
            ("stock", lambda: self.rate(self.stock, batch, t_len)),
            ("t", lambda: self.rate(self.mixed.engine, batch, t_len)),
            ("s", lambda: self.rate(self.alone, batch, s_len)),
            ("m", lambda: self.rate(self.mixed.engine, batch, t_len, s_len)),
        ]
        if self.shared is not None:
            calls.append(("2t", lambda: self.rate(self.stock, batch, t_len, second=s_len)))
            calls.append(("shared", lambda: self.rate(self.shared.engine, batch, t_len, s_len)))
        self.rng.shuffle(calls)
        rates = {name: call() for name, call in calls}
        rates["L"] = 1 / (1 / rates["t"] + 1 / rates["s"])
        return rates


def mixing_ms(batch: int, vocab_size: int, repeats: int = 20) -> float:
    """Median milliseconds of solving alpha, mixing and the sampled token's extras for ``batch`` rows, alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    teacher, student = (3 * torch.randn(batch, vocab_size, generator=generator, device=device) for _ in range(2))
    params = AlphaParams.from_lists(["kl_symmetry"] * batch, [0.0] * batch, [1.0] * batch, [0.5] * batch, device)
    temperatures = torch.ones(batch, 1, device=device)
    token_ids = torch.zeros(batch, dtype=torch.int64, device=device)

    def once() -> None:
        mixture = mix(teacher, student, temperatures, params)
        token_logprobs(mixture, teacher, student, temperatures, token_ids)
        if device == "cuda":
            torch.cuda.synchronize()

    once()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    args = parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    rows, raw = [], {}
    console = Console(width=max(Console().width, 140))
    bench = Bench(args)
    try:
        for batch in args.batch_sizes:
            bench.round(batch)  # warm-up
            rounds = [bench.round(batch) for _ in range(args.rounds)]
            raw[batch] = rounds
            rows.append(summary(batch, rounds))
            console.print(rows[-1])  # now: a run that is cut short keeps what it has
        vocab_size = bench.mixed.engine.tokenizer_manager.model_config.vocab_size
    finally:
        bench.close()
    for row in rows:
        row["mixing ms"] = mixing_ms(row["batch"], vocab_size)
    show(console, rows, device)
    if args.output:
        about = {"device": device, "machine": platform.machine(), "torch": torch.__version__}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.output.write_text(json.dumps({**about, "settings": settings, "summary": rows, "rounds": raw}, indent=1))


def summary(batch: int, rounds: list[dict[str, float]]) -> dict[str, float]:
    def median(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(r) for r in rounds)

    row: dict[str, float] = {"batch": batch}
    names = [name for name in ("stock", "t", "s", "m", "L", "2t", "shared") if name in rounds[0]]
    row.update({name: median(lambda r, n=name: r[n]) for name in names})
    row["m/L"] = median(lambda r: r["m"] / r["L"])
    if "shared" in names:
        row["shared/(2t/2)"] = median(lambda r: r["shared"] / (r["2t"] / 2))
        row["shared/t"] = median(lambda r: r["shared"] / r["t"])
    row["t/stock"] = median(lambda r: r["t"] / r["stock"])
    # Time of one step a batch, and what a mixed one takes beyond the two models' own.
    row["m ms"] = median(lambda r: 1e3 * batch / r["m"])
    row["beyond ms"] = median(lambda r: 1e3 * batch * (1 / r["m"] - 1 / r["L"]))
    return row


def show(console: Console, rows: list[dict[str, float]], device: str) -> None:
    table = Table(title=f"tokens/s, {device}", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if "/" in k else f"{v:.1f}" if k != "batch" else str(v) for k, v in row.items()))
    console.print(table)


if __name__ == "__main__":
    main()
