"""Throughput of mixed sampling beside its limits, all rates taken in one run.

    python -m bench.throughput --model-path T [--student-model-path S] [--batch-size 1 8 32] [--output-len 64] \\
        [--server-args --attention-backend triton]

Rates, in generated tokens a second over whole calls (prefill included, nothing cached):

    stock  SGLang's own engine with the teacher
    t      plain requests on our engine (the teacher alone)
    s      the student alone, on SGLang's own engine
    m      mixed requests on our engine, student and teacher each with weights of their own
    2t     plain requests on SGLang's own engine, twice as many, half of them with the student's prompts
    shared mixed requests on our engine with shared weights (only where both models are one)

L = 1 / (1/t + 1/s) is the limit for two models in lockstep, 2t/2 that of shared weights. The engines live side by side,
idle ones asleep, and the rounds go through them in random order, so that a machine's drift hits all alike; ratios are
taken within a round, and reported as median (smallest–largest) over the rounds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.common import (
    add_output_arguments,
    add_server_arguments,
    append_record,
    device_name,
    new_figure,
    random_prompts,
    save_figure,
    server_arguments,
    spread,
    with_spread,
)
from sglang_optimal import OptimalSampler

RATES = ("stock", "t", "s", "m", "2t", "shared")
RATIOS = {
    "m/L": lambda r: r["m"] * (1 / r["t"] + 1 / r["s"]),
    "m/t": lambda r: r["m"] / r["t"],
    "shared/(2t/2)": lambda r: 2 * r["shared"] / r["2t"],
    "shared/m": lambda r: r["shared"] / r["m"],
    "shared/t": lambda r: r["shared"] / r["t"],
    "t/stock": lambda r: r["t"] / r["stock"],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--student-model-path", help="Default: the teacher.")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=96, help="The teacher's prompt. Default: %(default)s.")
    parser.add_argument("--student-input-len", type=int, default=64, help="Default: %(default)s.")
    parser.add_argument("--output-len", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=3, help="Rounds. Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Default: %(default)s.")
    parser.add_argument("--alpha-method", default="kl_symmetry", help="Default: %(default)s.")
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES), help="Default: all.")
    parser.add_argument(
        "--max-total-tokens", type=int, default=None, help="KV pool of each engine. Default: what it takes."
    )
    parser.add_argument("--mem-fraction-static", type=float, default=None, help="SGLang's flag, for each engine.")
    parser.add_argument("--load-format", default=None, help="SGLang's flag; 'dummy' needs no weights.")
    add_output_arguments(parser, "throughput")
    add_server_arguments(parser, "every SGLang engine")
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
        longest = max(args.input_len, args.student_input_len) + max(args.output_len) + 8
        arguments: dict[str, Any] = {
            # twice the largest batch, with both contexts of each
            "max_total_tokens": args.max_total_tokens or 4 * max(args.batch_size) * longest,
            "context_length": max(2048, longest + 8),
            "max_running_requests": 2 * max(args.batch_size),
            "sleep_on_idle": True,
            "log_level": "error",
        }
        for name in ("mem_fraction_static", "load_format"):
            if getattr(args, name) is not None:
                arguments[name] = getattr(args, name)
        arguments = server_arguments(args.server_args, arguments)
        student = args.student_model_path or args.model_path
        self.memory: dict[str, Memory] = {}
        self.engines: dict[str, Any] = {}

        def start(name: str, make: Callable[[], Any]) -> Any:
            self.memory[name] = Memory()
            self.engines[name] = made = make()
            self.memory[name].started()
            return made

        self.stock = start("stock", lambda: sglang.Engine(model_path=args.model_path, **arguments))
        # One model for both: its own engine serves as the student's.
        self.alone = self.stock
        if student != args.model_path:
            self.alone = start("student", lambda: sglang.Engine(model_path=student, **arguments))
        self.mixed = start(
            "two-model", lambda: OptimalSampler(args.model_path, student, student_weights="separate", **arguments)
        )
        self.shared = None
        if self.alone is self.stock and "shared" in args.rates:
            self.shared = start("shared", lambda: OptimalSampler(args.model_path, **arguments))
        config = self.stock.tokenizer_manager.model_config
        self.vocab_size = min(config.vocab_size, len(self.stock.tokenizer_manager.tokenizer or [0] * config.vocab_size))

    def close(self) -> None:
        for engine in self.engines.values():
            engine.shutdown()

    def rate(self, engine, batch: int, output_len: int, length: int, student_length: int = 0, second: int = 0) -> float:
        """Generated tokens a second of one call with ``batch`` fresh prompts, and as many of length ``second``."""
        args = self.args
        params = {"temperature": args.temperature, "max_new_tokens": output_len, "ignore_eos": True}
        each: list[dict[str, Any]] = [dict(params) for _ in range(batch)]
        if student_length:
            for one, ids in zip(each, random_prompts(self.rng, batch, student_length, self.vocab_size), strict=True):
                one["custom_params"] = {"student_input_ids": ids, "alpha_method": args.alpha_method}
        ids = random_prompts(self.rng, batch, length, self.vocab_size)
        if second:
            ids, each = ids + random_prompts(self.rng, batch, second, self.vocab_size), each * 2
        start = time.perf_counter()
        outputs = engine.generate(input_ids=ids, sampling_params=each)
        seconds = time.perf_counter() - start
        tokens = sum(len(output["output_ids"]) for output in outputs)
        assert tokens == len(ids) * output_len, "the pools are too small for this batch"
        assert not any(output["meta_info"].get("num_retractions") for output in outputs), "requests were retracted"
        return tokens / seconds

    def round(self, batch: int, output_len: int) -> dict[str, float]:
        t_len, s_len = self.args.input_len, self.args.student_input_len
        calls: list[tuple[str, Callable[[], float]]] = [
            ("stock", lambda: self.rate(self.stock, batch, output_len, t_len)),
            ("t", lambda: self.rate(self.mixed.engine, batch, output_len, t_len)),
            ("s", lambda: self.rate(self.alone, batch, output_len, s_len)),
            ("m", lambda: self.rate(self.mixed.engine, batch, output_len, t_len, s_len)),
        ]
        if self.alone is self.stock:
            calls.append(("2t", lambda: self.rate(self.stock, batch, output_len, t_len, second=s_len)))
        if self.shared is not None:
            calls.append(("shared", lambda: self.rate(self.shared.engine, batch, output_len, t_len, s_len)))
        calls = [(name, call) for name, call in calls if name in self.args.rates]
        self.rng.shuffle(calls)
        return {name: call() for name, call in calls}


class Memory:
    """Memory of one engine: on a GPU what it took of the device, else the peak of its scheduler's resident set."""

    def __init__(self):
        self._processes = {p.pid for p in psutil.Process().children(recursive=True)}
        self._device = self._used_on_device()
        self._scheduler: int | None = None
        self._taken = 0

    @staticmethod
    def _used_on_device() -> int:
        if not torch.cuda.is_available():
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def started(self) -> None:
        new = [p for p in psutil.Process().children(recursive=True) if p.pid not in self._processes]
        self._scheduler = max(new, key=lambda p: p.memory_info().rss).pid  # the one that holds the weights
        self._taken = self._used_on_device() - self._device

    def gigabytes(self) -> float:
        if torch.cuda.is_available():
            return self._taken / 1e9
        with open(f"/proc/{self._scheduler}/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e9


def kv_bytes_per_token(engine) -> int:
    """Bytes of keys and values of one token in one model's pool (multi-head and grouped-query attention)."""
    config = engine.tokenizer_manager.model_config
    heads, width = config.get_num_kv_heads(1), config.head_dim + config.v_head_dim
    return config.num_hidden_layers * heads * width * config.dtype.itemsize


def main() -> None:
    args = parse_args()
    console = Console(width=max(Console().width, 160))
    bench = Bench(args)
    records = []
    try:
        bench.round(min(args.batch_size), 8)  # warm-up
        for output_len in args.output_len:
            for batch in args.batch_size:
                rounds = [bench.round(batch, output_len) for _ in range(args.repeats)]
                records.append(summary(batch, output_len, rounds))
                about = {n: getattr(args, n) for n in ("input_len", "student_input_len", "server_args")}
                append_record(args, {"bench": "throughput", **about, **records[-1], "rounds": rounds})
                console.print(f"batch {batch}, {output_len} new tokens:", records[-1]["ratios"], highlight=False)
        memory = {name: m.gigabytes() for name, m in bench.memory.items()}
        kv = {name: kv_bytes_per_token(engine) for name, engine in (("teacher", bench.stock), ("student", bench.alone))}
        kv_mixed = {"two-model": kv["teacher"] + kv["student"], "shared": 2 * kv["teacher"]}
        append_record(args, {"bench": "memory", "peak_gb": memory, "kv_bytes": kv, "kv_bytes_mixed_token": kv_mixed})
    finally:
        bench.close()
    show(console, records)
    kind = "on the device" if torch.cuda.is_available() else "peak of the scheduler's resident set"
    console.print(f"memory, {kind}, GB: " + ", ".join(f"{k} {v:.2f}" for k, v in memory.items()), highlight=False)
    console.print(f"KV bytes a token: {kv}; of a mixed request: {kv_mixed} (less what its contexts share)")
    plot(args, records)


def summary(batch: int, output_len: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    ratios = {}
    for name, of in RATIOS.items():
        try:
            ratios[name] = spread(of(r) for r in rounds)
        except KeyError:  # a rate that was left out
            continue
    rates = {name: spread(r[name] for r in rounds) for name in rounds[0]}
    return {"batch_size": batch, "output_len": output_len, "rates": rates, "ratios": ratios}


def show(console: Console, records: list[dict[str, Any]]) -> None:
    table = Table(title=f"tokens/s and ratios, {device_name()}", title_justify="left")
    rates, ratios = list(records[0]["rates"]), list(records[0]["ratios"])
    order = [name for name in RATES if name in rates]
    for name in ("batch", "new", *order, *ratios):
        table.add_column(name, justify="right")
    for r in records:
        table.add_row(
            *(str(r["batch_size"]), str(r["output_len"])),
            *(f"{r['rates'][name]['median']:.1f}" for name in order),
            *(with_spread(r["ratios"][name]) for name in ratios),
        )
    console.print(table)


def plot(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    figure, axes = new_figure(2)
    rates, ratios = axes[0]
    output_len = args.output_len[0]
    rows = [r for r in records if r["output_len"] == output_len]
    batches = [r["batch_size"] for r in rows]
    if {"t", "s"} <= rows[0]["rates"].keys():
        limit = [1 / (1 / r["rates"]["t"]["median"] + 1 / r["rates"]["s"]["median"]) for r in rows]
        rates.plot(batches, limit, "k--", label="L")
    if "2t" in rows[0]["rates"]:
        rates.plot(batches, [r["rates"]["2t"]["median"] / 2 for r in rows], "k:", label="2t/2")
    for name in ("t", "m", "shared"):
        if name in rows[0]["rates"]:
            rates.plot(batches, [r["rates"][name]["median"] for r in rows], marker="o", label=name)
    rates.set(xscale="log", xlabel="batch size", ylabel="tokens/s", title=f"{output_len} new tokens")
    for name in ("m/L", "shared/(2t/2)", "t/stock"):
        if name in rows[0]["ratios"]:
            of = [r["ratios"][name] for r in rows]
            error = [[v["median"] - v["min"] for v in of], [v["max"] - v["median"] for v in of]]
            ratios.errorbar(batches, [v["median"] for v in of], yerr=error, marker="o", capsize=3, label=name)
    ratios.axhline(0.95, color="grey", linewidth=0.8)
    ratios.set(xscale="log", xlabel="batch size", title="ratios: median, smallest to largest")
    for axis in (rates, ratios):
        axis.legend()
    figure.suptitle(f"Mixed sampling beside its limits ({device_name()})", y=1.02)
    save_figure(figure, args.plot)


if __name__ == "__main__":
    main()
