"""Mixed sampling beside what people use today, on the same prompts, all rates taken in one run.

    python -m bench.peers_throughput --model-path T [--student-model-path S] --batch-size 1 8 16 \\
        --input-len 96 --student-input-len 64 --output-len 64 [--server-args --load-format dummy]

    ours              OptimalSampler with two models, weights of their own
    transformers      a loop of one's own: two Hugging Face models with KV caches, in the same dtype
    nested-recompute  stock SGLang whose logits processor asks a second stock SGLang for the student's 20 most likely
                      tokens; the student computes its whole context at every step, as with prompt log-probabilities
    nested-cached     the same, the student's context served from its radix cache
    teacher           stock SGLang, the teacher alone: no mixing at all
    generate          the teacher alone in transformers' own generate
    shared            ours with the teacher as its own student, weights shared: for the time, whatever the student is

Rates are generated tokens a second over whole calls, prefill included. A round goes through all of them in random order
with the same fresh random prompts; ratios are medians over the rounds. Idle engines sleep. Everything samples at
temperature 1 with alpha from kl_symmetry (the nested design: on 20 tokens).

How far the nested design's samples are from q* is measured first, on the demo's word problems (--no-distance: not).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common import (
    add_output_arguments,
    add_server_arguments,
    append_record,
    new_figure,
    positive_int,
    random_prompts,
    save_figure,
    server_arguments,
    spread,
    with_spread,
)

PEERS = ("transformers", "nested-recompute", "nested-cached", "teacher", "generate", "shared")
BESIDE = (("teacher", "generate"), ("shared", "transformers"))
"""Ratios of peers among themselves."""

Prompts = list[list[int]]
Generate = Callable[[Prompts, Prompts, int], list[list[int]]]
"""(teacher's prompts, student's prompts, new tokens) -> new tokens of each."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers_throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--student-model-path", help="Default: the teacher.")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="Default: all.")
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1, 8, 16], help="Default: 1 8 16.")
    parser.add_argument("--input-len", type=positive_int, default=96, help="Teacher's prompt. Default: %(default)s.")
    parser.add_argument("--student-input-len", type=positive_int, default=64, help="Default: %(default)s.")
    parser.add_argument(
        "--output-len", type=positive_int, default=64, help="New tokens a request. Default: %(default)s."
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="Rounds, after a warm-up. Default: %(default)s."
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="Of all models."
    )
    parser.add_argument("--seed", type=int, default=1, help="Default: %(default)s.")
    parser.add_argument("--no-distance", action="store_true", help="Skip the distance from q*; it needs real weights.")
    parser.add_argument(
        "--distance-num-prompts", type=positive_int, default=12, help="Of the demo's problems. Default: %(default)s."
    )
    parser.add_argument("--distance-output-len", type=positive_int, default=48, help="At most. Default: %(default)s.")
    add_output_arguments(parser, "peers_throughput")
    add_server_arguments(parser, "every SGLang engine")
    args = parser.parse_args()
    args.student_model_path = args.student_model_path or args.model_path
    return args


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of SGLang's ServerArgs: room for the largest batch, and what ``--server-args`` says, over them."""
    largest = max(args.batch_size)
    # Twice what the requests hold: SGLang admits a request only with room for all that it may still generate.
    tokens = 2 * largest * (args.input_len + args.student_input_len + 2 * args.output_len) + 1024
    defaults = {
        "dtype": args.dtype,
        "max_total_tokens": tokens,
        "max_running_requests": largest,
        "sleep_on_idle": True,
        "log_level": "error",
    }
    return server_arguments(args.server_args, defaults)


class Contenders:
    """Ours and the peers, all started; as a context manager, stopped at the end.

    Attributes:
        generate: {name: call}. prepare: {name: what to do before a timed call}.
        vocab_size: ids below it are in both vocabularies.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.generate: dict[str, Generate] = {}
        self.prepare: dict[str, Callable[[], None]] = {}
        self.vocab_size = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Contenders:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.close()

    def _start(self) -> None:
        import sglang

        from bench.peers.nested import NestedSampler
        from bench.peers.transformers_loop import TransformersLoop, generate_alone
        from sglang_optimal import OptimalSampler

        args, arguments = self.args, engine_arguments(self.args)
        models = (args.model_path, args.student_model_path)
        ours = self._stack.enter_context(OptimalSampler(*models, student_weights="separate", **arguments))
        self.vocab_size = ours.engine.tokenizer_manager.model_config.vocab_size
        self.generate["ours"] = lambda *call: _sglang_generate(ours.engine, *call, mixed=True)
        if "shared" in args.peers:
            shared = self._stack.enter_context(OptimalSampler(args.model_path, **arguments))
            self.generate["shared"] = lambda *call: _sglang_generate(shared.engine, *call, mixed=True)
        if {"transformers", "generate"} & set(args.peers):
            random_weights = arguments.get("load_format") == "dummy"
            loop = TransformersLoop(*models, getattr(torch, args.dtype), random_weights=random_weights)
            self.vocab_size = min(self.vocab_size, loop.teacher.config.vocab_size, loop.student.config.vocab_size)
            calls: dict[str, Generate] = {
                "transformers": lambda *call: loop.generate(*call, temperature=1.0, seed=args.seed),
                "generate": lambda teacher_ids, _, new_tokens: generate_alone(loop.teacher, teacher_ids, new_tokens),
            }
            self.generate |= {name: call for name, call in calls.items() if name in args.peers}
        if "teacher" in args.peers:
            stock = sglang.Engine(model_path=args.model_path, **arguments)
            self._stack.callback(stock.shutdown)
            self.generate["teacher"] = lambda *call: _sglang_generate(stock, *call, mixed=False)
        if {"nested-recompute", "nested-cached"} & set(args.peers):
            nested = NestedSampler(*models, **arguments)
            self._stack.callback(nested.shutdown)
            for name in ("nested-recompute", "nested-cached"):
                if name in args.peers:
                    recompute = name == "nested-recompute"
                    self.generate[name] = lambda *call, r=recompute: nested.generate(*call, recompute=r)
                    # Both variants share the servers, and the other one has just had the same prompts.
                    self.prepare[name] = nested.flush_cache


def _sglang_generate(engine, teacher_ids: Prompts, student_ids: Prompts, new_tokens: int, mixed: bool) -> Prompts:
    params = {"temperature": 1.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    each = [
        {**params, "custom_params": {"student_input_ids": ids, "alpha_method": "kl_symmetry"}} if mixed else params
        for ids in student_ids
    ]
    return [output["output_ids"] for output in engine.generate(input_ids=teacher_ids, sampling_params=each)]


class Bench:
    """Rounds over all contenders.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace, contenders: Contenders):
        self.args = args
        self.contenders = contenders
        self.rng = random.Random(args.seed)

    def round(self, batch: int, new_tokens: int) -> dict[str, float]:
        """{name: generated tokens a second} for one batch of fresh prompts, the same for all, in random order."""
        args, contenders = self.args, self.contenders
        teacher_ids = random_prompts(self.rng, batch, args.input_len, contenders.vocab_size)
        student_ids = random_prompts(self.rng, batch, args.student_input_len, contenders.vocab_size)
        names = list(contenders.generate)
        self.rng.shuffle(names)
        rates = {}
        for name in names:
            contenders.prepare.get(name, lambda: None)()
            start = time.perf_counter()
            outputs = contenders.generate[name](teacher_ids, student_ids, new_tokens)
            seconds = time.perf_counter() - start
            if [len(output) for output in outputs] != [new_tokens] * batch:
                raise RuntimeError(f"{name}: a generation ended early.")
            rates[name] = batch * new_tokens / seconds
        return rates

    def run(self, batch: int) -> dict[str, Any]:
        """Record of one batch size."""
        args = self.args
        self.round(batch, min(args.output_len, 8))  # warm-up
        rounds = [self.round(batch, args.output_len) for _ in range(args.repeats)]
        peers = [name for name in PEERS if name in rounds[0]]
        return {
            "model_path": args.model_path,
            "student_model_path": args.student_model_path,
            "dtype": args.dtype,
            "server_args": args.server_args,
            "batch_size": batch,
            "input_len": args.input_len,
            "student_input_len": args.student_input_len,
            "output_len": args.output_len,
            "tokens_per_s": {name: spread(r[name] for r in rounds) for name in ["ours", *peers]},
            "over": {f"{a}/{b}": spread(r[a] / r[b] for r in rounds) for a, b in BESIDE if {a, b} <= rounds[0].keys()},
            "ours_over": {name: spread(r["ours"] / r[name] for r in rounds) for name in peers},
            "rounds": rounds,
        }


def measure_distance(args: argparse.Namespace) -> dict[str, Any]:
    """Record of the nested design's distance from q*; its models are gone afterwards."""
    from bench.peers import distance
    from sglang_optimal.demo.problems import load_problems

    problems = load_problems()[: args.distance_num_prompts]
    measured = distance.measure(args.model_path, args.student_model_path, problems, args.distance_output_len, args.seed)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    models = {"model_path": args.model_path, "student_model_path": args.student_model_path}
    about = {"prompts": len(problems), "output_len": args.distance_output_len, "seed": args.seed}
    return {**models, "distance": {**about, **measured.summary()}}


def show_distance(console: Console, record: dict[str, Any]) -> None:
    d = record["distance"]
    table = Table(title=f"Nested design and q*, {d['positions']} positions of real text", title_justify="left")
    for name in ("", "mean", "max"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("total variation", f"{d['total_variation_mean']:.4f}", f"{d['total_variation_max']:.4f}")
    table.add_row("mass of q* never sampled", f"{d['mass_outside_mean']:.4f}", f"{d['mass_outside_max']:.4f}")
    table.add_row("|alpha difference|", f"{d['alpha_difference_mean']:.4f}", "")
    console.print(table)


def show(console: Console, records: list[dict[str, Any]]) -> None:
    table = Table(title="tokens/s, and ours over each: median (min–max)", title_justify="left")
    table.add_column("batch", justify="right")
    for name in records[0]["tokens_per_s"]:
        table.add_column(name, justify="right")
    for record in records:
        rates = [with_spread(value, 1) for value in record["tokens_per_s"].values()]
        ratios = ["ours/", *(with_spread(value) for value in record["ours_over"].values())]
        table.add_row(str(record["batch_size"]), *rates)
        table.add_row("", *ratios, end_section=True)
    console.print(table)
    for record in records:
        for name, value in record["over"].items():
            console.print(f"batch {record['batch_size']}: {name} {with_spread(value)}")


def plot(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    figure, axes = new_figure(2)
    batches = [record["batch_size"] for record in records]
    panels = [
        ("tokens_per_s", "generated tokens / s", axes[0][0]),
        ("ours_over", "ours / peer (median, min–max)", axes[0][1]),
    ]
    colors = {name: f"C{i}" for i, name in enumerate(records[0]["tokens_per_s"])}
    for field, label, axis in panels:
        for name in records[0][field]:
            values = [record[field][name] for record in records]
            medians = [value["median"] for value in values]
            spans = [
                [value["median"] - value["min"] for value in values],
                [value["max"] - value["median"] for value in values],
            ]
            axis.errorbar(batches, medians, spans, marker="o", capsize=3, label=name, color=colors[name])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_xlabel("batch size")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    axes[0][1].axhline(1, color="black", linewidth=0.8)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, args.plot)


def main() -> None:
    args = parse_args()
    console = Console(width=max(Console().width, 140))
    if not args.no_distance:
        record = measure_distance(args)
        append_record(args, record)
        show_distance(console, record)
    records = []
    with Contenders(args) as contenders:
        bench = Bench(args, contenders)
        for batch in args.batch_size:
            records.append(bench.run(batch))
            append_record(args, records[-1])  # now: a run that is cut short keeps what it has
            show(console, records[-1:])
    plot(args, records)
    console.print(f"Records: {args.result_filename}; picture: {args.plot}")


if __name__ == "__main__":
    main()
