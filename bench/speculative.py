"""What drafting gives: lockstep, k drafts a step, and ``auto``, beside the teacher alone, all in one run.

    python -m bench.speculative --model-path T --student-model-path S [--draft-tokens 1 2 4 8] [--batch-size 1 4 16]

Rates, in generated tokens a second, of B clients that each send their next request when the last is answered
(``--waves`` requests a client; prefill included, caches flushed before):

    t       plain requests: the teacher alone
    m       mixed requests in lockstep
    m_k     mixed requests with k drafts a step; m_0 is lockstep on the engine that drafts
    auto    mixed requests, the number of drafts chosen online

The prompts are word problems that ``bench.small_student`` has not seen; the teacher is told the solution. Answers have
from half to one and a half times ``--output-len`` tokens. Every round has prompts and lengths of its own, the same for
all modes, which come in random order; ratios are taken within a round, and are medians (smallest–largest).

The model beside the measurement: with a the chance that a draft is accepted and B requests, a step of k drafts gives
E = 1 + a + … + a^k tokens a request and costs V + (k + 1)·s, where V is a step of the teacher on (k + 1)·B rows and s
one of the student on B; lockstep costs t + s a token, with t = V for k = 0. Speed-up: E·(t + s) / (V + (k + 1)·s). The
costs are measured in the same run, as the time that one greedy token more takes; the model leaves mixing and sampling
out.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from bench import drafts_control
from bench.common import (
    add_output_arguments,
    add_server_arguments,
    append_record,
    device_name,
    new_figure,
    non_negative_int,
    positive_int,
    random_prompts,
    save_figure,
    server_arguments,
    spread,
    with_spread,
)
from bench.engine_process import EngineProcess
from bench.small_student import held_out

LONGEST_CONTEXT = 160  # tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--student-model-path", required=True)
    parser.add_argument("--draft-tokens", type=non_negative_int, nargs="+", default=list(range(9)))
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output-len", type=positive_int, default=64, help="Default: %(default)s.")
    parser.add_argument("--waves", type=positive_int, default=3, help="Requests a client. Default: %(default)s.")
    parser.add_argument("--repeats", type=positive_int, default=3, help="Rounds. Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy. Default: %(default)s.")
    parser.add_argument("--top-p", type=float, default=1.0, help="Default: %(default)s.")
    parser.add_argument("--alpha-method", default="kl_symmetry", help="Default: %(default)s.")
    parser.add_argument("--dtype", default="auto", help="SGLang's flag. Default: %(default)s.")
    parser.add_argument(
        "--load-format", help="SGLang's flag; 'dummy' needs no weights: costs are measured, acceptance means nothing."
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        nargs="+",
        default=[0.6, 0.7, 0.8, 0.9],
        help="What the measured costs give for these is printed as well. Default: %(default)s.",
    )
    add_output_arguments(parser, "speculative")
    add_server_arguments(parser, "every SGLang engine")
    return parser.parse_args()


class Bench:
    """Three engines with the same two models: lockstep, a given number of drafts, and ``auto``."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rng = args, random.Random(0)
        longest = LONGEST_CONTEXT + args.output_len * 3 // 2
        largest, most = max(args.batch_size), max(args.draft_tokens)
        arguments: dict[str, Any] = {
            "max_total_tokens": 2 * largest * (longest + 2 * most + 2),
            "context_length": max(2048, longest + 8),
            # The teacher's step on the rows of a verification is measured with as many plain requests.
            "max_running_requests": largest * (most + 1),
            "sleep_on_idle": True,
            "dtype": args.dtype,
            "log_level": "error",
        }
        if args.load_format is not None:
            arguments["load_format"] = args.load_format
        pair = (args.model_path, args.student_model_path)
        path = Path(tempfile.mkdtemp()) / "drafts"
        self.control = drafts_control.Control(path)
        wide = {**arguments, "max_total_tokens": 2 * largest * (most + 1) * longest}
        wide, arguments = (server_arguments(args.server_args, defaults) for defaults in (wide, arguments))
        drafts = {**arguments, "draft_tokens": most}
        self.engines = {
            "lockstep": EngineProcess(*pair, student_weights="separate", **wide),
            "given": EngineProcess(*pair, control=path, mixing_mode="speculative", **drafts),
            "auto": EngineProcess(*pair, mixing_mode="auto", **drafts),
            "student": EngineProcess(args.student_model_path, **wide),
        }
        if args.load_format == "dummy":
            self.contexts = [tuple(random_prompts(self.rng, 1, n, 30000)[0] for n in (96, 64)) for _ in range(200)]
        else:
            self.contexts = held_out(AutoTokenizer.from_pretrained(args.model_path))

    def close(self) -> None:
        for engine in self.engines.values():
            engine.shutdown()

    def workload(self, batch: int) -> list[tuple[list[int], list[int], int]]:
        """(teacher context, student context, tokens to generate) of the requests of ``batch`` clients."""
        most = self.args.output_len
        pairs = self.rng.choices(self.contexts, k=batch * self.args.waves)
        return [(*pair, self.rng.randint(most // 2, most * 3 // 2)) for pair in pairs]

    def params(self, new: int, temperature: float) -> dict[str, Any]:
        return {"temperature": temperature, "top_p": self.args.top_p, "max_new_tokens": new, "ignore_eos": True}

    def rate(self, name: str, batch: int, work: list[tuple[list[int], list[int], int]]) -> dict[str, float]:
        """Tokens a second of ``batch`` clients, and what is known of their drafts."""
        engine = {"t": "lockstep", "m": "lockstep", "auto": "auto"}.get(name, "given")
        if engine == "given":
            self.control.write(int(name.removeprefix("m_")))
        self.engines[engine].flush_cache()
        params = [self.params(new, self.args.temperature) for _, _, new in work]
        if name != "t":
            for one, (_, student, _) in zip(params, work, strict=True):
                one["custom_params"] = {"student_input_ids": student, "alpha_method": self.args.alpha_method}
        seconds, answers = self.engines[engine].serve(batch, [teacher for teacher, _, _ in work], params)
        assert [tokens for tokens, _ in answers] == [new for _, _, new in work]
        result = {"rate": sum(new for _, _, new in work) / seconds}
        if engine != "lockstep":
            # The first token of each is a prefill's.
            result["tokens_per_step"] = sum(new - 1 for _, _, new in work) / sum(steps for _, steps in answers)
        return result

    def step_seconds(self, engine: str, rows: int) -> float:
        """What one more greedy token for each of ``rows`` plain requests takes; their prompts are in the cache."""
        prompts = [teacher for teacher, _ in self.rng.choices(self.contexts, k=rows)]

        def seconds(new: int) -> float:
            params = self.params(new, temperature=0.0)
            return self.engines[engine].generate(input_ids=prompts, sampling_params=params)[0]

        seconds(1)
        return spread((seconds(18) - seconds(2)) / 16 for _ in range(3))["median"]


def expected_tokens(acceptance: float, k: int) -> float:
    """1 + a + … + a^k."""
    return sum(acceptance**i for i in range(k + 1))


def acceptance(tokens_per_step: float, k: int) -> float:
    """The a that gives ``tokens_per_step``."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, k) < tokens_per_step else (low, middle)
    return low


def summary(bench: Bench, batch: int, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    args = bench.args
    rates = {name: spread(r[name]["rate"] for r in rounds) for name in rounds[0]}
    over = {name: spread(r[name]["rate"] / r["m"]["rate"] for r in rounds) for name in rounds[0]}
    over_t = {name: spread(r[name]["rate"] / r["t"]["rate"] for r in rounds) for name in rounds[0]}
    per_step = {n: spread(r[n]["tokens_per_step"] for r in rounds)["median"] for n in rounds[0] if n.startswith("m_")}
    accepted = {n: acceptance(value, int(n[2:])) for n, value in per_step.items() if n != "m_0"}
    costs = {
        "t": bench.step_seconds("lockstep", batch),
        "s": bench.step_seconds("student", batch),
    }
    drafts = [k for k in args.draft_tokens if k]
    for k in drafts:
        costs[f"t({batch * (k + 1)})"] = bench.step_seconds("lockstep", batch * (k + 1))

    def predicted(k: int, a: float) -> float:
        """Speed-up over lockstep."""
        step = costs[f"t({batch * (k + 1)})"] + (k + 1) * costs["s"]
        return expected_tokens(a, k) * (costs["t"] + costs["s"]) / step

    return {
        "batch_size": batch,
        "rates": rates,
        "over_lockstep": over,
        "over_teacher": over_t,
        "tokens_per_step": per_step,
        "acceptance": accepted,
        "model_over_lockstep": {name: predicted(int(name[2:]), a) for name, a in accepted.items()},
        "model_for_acceptance": {a: {k: predicted(k, a) for k in drafts} for a in args.acceptance},
        "step_seconds": costs,
        "cost_ratio": costs["t"] / costs["s"],
    }


def show(console: Console, args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    table = Table(title=f"drafting, {device_name()}, temperature {args.temperature}", title_justify="left")
    for name in ("batch", "mode", "tokens/s", "over lockstep", "over the teacher", "tokens a step", "a", "model"):
        table.add_column(name, justify="right")
    for r in records:
        for name in r["rates"]:
            known = name in r["acceptance"]
            table.add_row(
                *(str(r["batch_size"]), name, f"{r['rates'][name]['median']:.1f}"),
                *(with_spread(r["over_lockstep"][name]), with_spread(r["over_teacher"][name])),
                f"{r['tokens_per_step'][name]:.2f}" if known else "",
                f"{r['acceptance'][name]:.2f}" if known else "",
                f"{r['model_over_lockstep'][name]:.2f}" if known else "",
            )
        table.add_section()
    console.print(table)
    for r in records:
        costs = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in r["step_seconds"].items())
        console.print(f"batch {r['batch_size']}: ms a step: {costs}", highlight=False)
        for a, by_length in r["model_for_acceptance"].items():
            best = max(by_length, key=by_length.get)
            console.print(f"  a = {a}: the costs give {by_length[best]:.2f} with {best} drafts", highlight=False)


def plot(args: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    figure, axes = new_figure(len(records))
    for axis, r in zip(axes[0], records, strict=True):
        k = args.draft_tokens
        axis.plot(k, [r["over_lockstep"][f"m_{i}"]["median"] for i in k], marker="o", label="measured")
        axis.plot(k, [r["model_over_lockstep"].get(f"m_{i}", 1.0) for i in k], "--", label="model")
        axis.axhline(r["over_lockstep"]["auto"]["median"], color="tab:green", label="auto")
        axis.axhline(r["over_lockstep"]["t"]["median"], color="grey", label="teacher alone")
        axis.set(xlabel="drafts a step", ylabel="tokens/s over lockstep", title=f"batch {r['batch_size']}")
        axis.legend()
    figure.suptitle(f"Speculative mixing ({device_name()}, temperature {args.temperature})", y=1.02)
    save_figure(figure, args.plot)


def main() -> None:
    args = parse_args()
    console = Console(width=max(Console().width, 140))
    bench = Bench(args)
    names = ["t", "m", *(f"m_{k}" for k in args.draft_tokens), "auto"]
    records = []
    try:
        for name in names:
            bench.rate(name, 1, bench.workload(1))  # warm-up
        for batch in args.batch_size:
            rounds = []
            for _ in range(2):
                bench.rate("auto", batch, bench.workload(batch))  # it has to learn what steps of this size cost
            for _ in range(args.repeats):
                work = bench.workload(batch)
                measured = {name: bench.rate(name, batch, work) for name in bench.rng.sample(names, len(names))}
                rounds.append({name: measured[name] for name in names})
            records.append(summary(bench, batch, rounds))
            names_of = ("model_path", "student_model_path", "temperature", "output_len", "server_args")
            about = {name: getattr(args, name) for name in names_of}
            append_record(args, {"bench": "speculative", **about, **records[-1], "rounds": rounds})
            show(console, args, records[-1:])
    finally:
        bench.close()
    show(console, args, records)
    plot(args, records)


if __name__ == "__main__":
    main()
