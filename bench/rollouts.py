"""Rollouts of the student with the teacher's log-probabilities: in one engine, and with a second server.

    python -m bench.rollouts --model-path T [--student-model-path S] --batch-size 8 [--server-args --load-format dummy]

    two-servers     stock SGLang samples the student, then a second stock SGLang scores the texts with the teacher
    one-pass        OptimalSampler with fixed_alpha 0: every step has both models' log-probabilities
    drafts          the same where the student drafts: the teacher verifies several tokens in one forward
    shared          one-pass with one model on both sides, its weights shared (whatever the student is)
    roll-and-score  OptimalSampler with the student in the teacher's place: plain rollouts, then `score`
    …+top-k         the same with the 64 most likely tokens of both models at each position

Rates are generated tokens a second over whole calls, prefill and scoring included. A round goes through all in random
order with the same fresh random prompts; ratios are medians over the rounds. Memory is what all processes of each hold
alone, once it has run.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import time
from collections.abc import Callable
from typing import Any

import psutil
import requests
from rich.console import Console
from rich.table import Table

from bench.common import (
    add_output_arguments,
    add_server_arguments,
    append_record,
    positive_int,
    random_prompts,
    spread,
    with_spread,
)
from bench.peers.nested import serve, wait_until_ready
from bench.peers_throughput import Prompts, engine_arguments
from sglang_optimal.server_process import free_port

KINDS = ("two-servers", "one-pass", "drafts", "shared", "roll-and-score")
TOP_K = 64
DRAFTS = 7


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rollouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="Teacher.")
    parser.add_argument("--student-model-path", help="Default: the teacher.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="Default: all.")
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[8], help="Default: 8.")
    parser.add_argument("--input-len", type=positive_int, default=96, help="Teacher's prompt. Default: %(default)s.")
    parser.add_argument("--student-input-len", type=positive_int, default=64, help="Default: %(default)s.")
    parser.add_argument("--output-len", type=positive_int, default=64, help="Default: %(default)s.")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="Rounds, after a warm-up. Default: %(default)s."
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="Of all models."
    )
    parser.add_argument("--seed", type=int, default=1, help="Default: %(default)s.")
    add_output_arguments(parser, "rollouts")
    add_server_arguments(parser, "every SGLang engine")
    args = parser.parse_args()
    args.student_model_path = args.student_model_path or args.model_path
    return args


class Contenders:
    """All kinds, started; as a context manager, stopped at the end.

    Attributes:
        roll: {name: call with the teacher's prompts, the student's, and the number of new tokens}; returns lists of the
            teacher's log-probabilities, one for each new token.
        pids: {name: processes that it has}.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.roll: dict[str, Callable[[Prompts, Prompts, int], list[list[float]]]] = {}
        self.pids: dict[str, list[int]] = {}
        self._stock: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Contenders:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.close()

    def _start(self) -> None:
        args = self.args
        arguments = engine_arguments(args)
        teacher, student = args.model_path, args.student_model_path
        # The last to end: SGLang's own engine ends every child of the process.
        self._stack.callback(lambda: None if self._stock is None else self._stock.shutdown())
        own = {"student_weights": "separate", **arguments}
        if "one-pass" in args.kinds:
            self._ours("one-pass", teacher, student, own)
        if "drafts" in args.kinds:
            self._process("drafts", teacher, student, {**own, "mixing_mode": "speculative", "draft_tokens": DRAFTS})
        if "shared" in args.kinds:
            self._ours("shared", teacher, None, arguments)
        if "roll-and-score" in args.kinds:
            self._ours("roll-and-score", student, teacher, own)
        if "two-servers" in args.kinds:
            self._two_servers(teacher, student, arguments)

    def _ours(self, name: str, first: str, second: str | None, arguments: dict[str, Any]) -> None:
        from sglang_optimal import OptimalSampler

        sampler = self._stack.enter_context(OptimalSampler(first, second, **arguments))
        self.pids[name] = sampler.engine._scheduler_init_result.all_child_pids
        for more, top_k in (("", None), ("+top-k", TOP_K)):
            self.roll[name + more] = _scored(sampler, top_k) if name == "roll-and-score" else _one_pass(sampler, top_k)

    def _process(self, name: str, teacher: str, student: str, arguments: dict[str, Any]) -> None:
        """An engine that drafts, in a process of its own, as SGLang's configuration of a process wants it."""
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve_rollouts, args=(there, teacher, student, arguments))
        process.start()
        self._stack.callback(process.join, 60)
        self._stack.callback(here.send, None)
        self.pids[name] = here.recv()
        for more, top_k in (("", None), ("+top-k", TOP_K)):

            def roll(*call, asked=top_k):
                here.send((asked, call))
                return here.recv()

            self.roll[name + more] = roll

    def _two_servers(self, teacher: str, student: str, arguments: dict[str, Any]) -> None:
        import sglang

        port = free_port()
        url = f"http://127.0.0.1:{port}"
        about = {"model_path": teacher, "host": "127.0.0.1", "port": port, "skip_tokenizer_init": True}
        server = multiprocessing.get_context("spawn").Process(target=serve, args=({**arguments, **about},))
        server.start()
        self._stack.callback(server.join, 60)
        self._stack.callback(lambda: _kill(server.pid))
        wait_until_ready(server, url)
        session = requests.Session()
        session.trust_env = False
        engine = self._stock = sglang.Engine(model_path=student, **arguments)
        self.pids["two-servers"] = [server.pid, *engine._scheduler_init_result.all_child_pids]

        def roll(teacher_ids: Prompts, student_ids: Prompts, new_tokens: int, top_k: int | None) -> list[list[float]]:
            params = {"temperature": 1.0, "max_new_tokens": new_tokens, "ignore_eos": True}
            texts = [out["output_ids"] for out in engine.generate(input_ids=student_ids, sampling_params=params)]
            body = {
                "input_ids": [prompt + text for prompt, text in zip(teacher_ids, texts, strict=True)],
                "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
                "return_logprob": True,
                "logprob_start_len": [len(prompt) - 1 for prompt in teacher_ids],
            }
            if top_k:
                body["top_logprobs_num"] = top_k
            response = session.post(f"{url}/generate", json=body)
            response.raise_for_status()
            found = [answer["meta_info"]["input_token_logprobs"] for answer in response.json()]
            return [[entry[0] for entry in each[-new_tokens:]] for each in found]

        self.roll["two-servers"] = lambda *call: roll(*call, None)
        self.roll["two-servers+top-k"] = lambda *call: roll(*call, TOP_K)


def _one_pass(sampler, top_k: int | None):
    def roll(teacher_ids: Prompts, student_ids: Prompts, new_tokens: int) -> list[list[float]]:
        results = sampler.generate(
            teacher_ids, student_ids, fixed_alpha=0.0, temperature=1.0, max_new_tokens=new_tokens, ignore_eos=True,
            return_mixing_info=True, return_top_k=top_k,
        )  # fmt: skip
        return [result.mixing_info["teacher_logprob"] for result in results]

    return roll


def _scored(sampler, top_k: int | None):
    """The sampler's first model is the student, its second the teacher."""

    def roll(teacher_ids: Prompts, student_ids: Prompts, new_tokens: int) -> list[list[float]]:
        params = {"temperature": 1.0, "max_new_tokens": new_tokens, "ignore_eos": True}
        texts = [out["output_ids"] for out in sampler.engine.generate(input_ids=student_ids, sampling_params=params)]
        results = sampler.score(student_ids, teacher_ids, texts, fixed_alpha=1.0, return_top_k=top_k)
        return [result.mixing_info["student_logprob"] for result in results]

    return roll


def _serve_rollouts(pipe, teacher: str, student: str, arguments: dict[str, Any]) -> None:
    from sglang_optimal import OptimalSampler

    with OptimalSampler(teacher, student, **arguments) as sampler:
        pipe.send(sampler.engine._scheduler_init_result.all_child_pids)
        while (asked := pipe.recv()) is not None:
            top_k, call = asked
            pipe.send(_one_pass(sampler, top_k)(*call))


def _kill(pid: int) -> None:
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(pid)


def memory(pids: list[int]) -> float:
    """GB that these processes and their children hold alone."""
    processes = {p for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))}
    return sum(process.memory_full_info().uss for process in processes) / 1e9


def run(args: argparse.Namespace, contenders: Contenders, batch: int) -> dict[str, Any]:
    """Record of one batch size."""
    from transformers import AutoConfig

    rng = random.Random(args.seed)
    vocab = AutoConfig.from_pretrained(args.model_path).vocab_size
    names, rounds = list(contenders.roll), []
    for number in range(args.repeats + 1):
        new_tokens = args.output_len if number else min(args.output_len, 8)
        # A set of prompts for each of an engine's two calls: the second would find the first one's in its caches.
        prompts = {
            more: [random_prompts(rng, batch, length, vocab) for length in (args.input_len, args.student_input_len)]
            for more in (False, True)
        }
        rng.shuffle(names)
        rates = {}
        for name in names:
            start = time.perf_counter()
            logprobs = contenders.roll[name](*prompts["+" in name], new_tokens)
            rates[name] = batch * new_tokens / (time.perf_counter() - start)
            if [len(each) for each in logprobs] != [new_tokens] * batch:
                raise RuntimeError(f"{name}: a log-probability is missing.")
        if number:
            rounds.append(rates)
    names.sort()
    plain = [name for name in names if not name.endswith("+top-k")]
    return {
        "model_path": args.model_path,
        "student_model_path": args.student_model_path,
        "dtype": args.dtype,
        "server_args": args.server_args,
        "batch_size": batch,
        "input_len": args.input_len,
        "student_input_len": args.student_input_len,
        "output_len": args.output_len,
        "tokens_per_s": {name: spread(r[name] for r in rounds) for name in names},
        "over_two_servers": {
            name: spread(r[name] / r["two-servers" + ("+top-k" if "+" in name else "")] for r in rounds)
            for name in names
            if "two-servers" in plain and not name.startswith("two-servers")
        },
        "with_top_k": {name: spread(r[f"{name}+top-k"] / r[name] for r in rounds) for name in plain},
        "memory_gb": {name: memory(pids) for name, pids in contenders.pids.items()},
        "rounds": rounds,
    }


def show(console: Console, record: dict[str, Any]) -> None:
    table = Table(title=f"batch {record['batch_size']}: median (min–max)", title_justify="left")
    for column in ("", "tokens/s", "over two servers", "with top-64 / without", "GB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, rate in record["tokens_per_s"].items():
        cells = [with_spread(rate, 1)]
        for field in ("over_two_servers", "with_top_k"):
            value = record[field].get(name)
            cells.append("" if value is None else with_spread(value))
        held = record["memory_gb"].get(name)
        table.add_row(name, *cells, "" if held is None else f"{held:.2f}")
    console.print(table)


def main() -> None:
    args = parse_args()
    console = Console(width=max(Console().width, 120))
    with Contenders(args) as contenders:
        for batch in args.batch_size:
            record = run(args, contenders, batch)
            append_record(args, record)
            show(console, record)
    console.print(f"Records: {args.result_filename}")


if __name__ == "__main__":
    main()
