"""Open-loop load test of the HTTP server: Poisson arrivals, streamed answers, plain and mixed requests.

    python -m bench.serving --model-path T [--student-model-path S] --request-rate 1 4 inf \\
        --num-prompts 200 --input-len 256 --student-input-len 128 --output-len 128 [--server-args --load-format dummy]

Starts ``python -m sglang_optimal.launch_server`` (or takes ``--base-url``), and sends at each request rate:

    plain  requests to the teacher alone
    mixed  requests with a student's prompt of their own
    half   as many of each, in random order, reported apart and together

Random prompts, no end of text, both caches flushed before each run, the same arrivals for every workload of a rate.
Arrivals and statistics are SGLang's own (sglang.benchmark.serving), so the names in the records are too. Its request
function is not used: it counts an error that arrives as an event of the stream as a success of full length. Here the
first request that fails, ends early, or is not answered from the mixture as asked ends everything with exit status 1.

TTFT is the time to the first token, ITL the time between tokens: where an event brings several, its gap is divided
evenly among them. Throughputs of a part of a workload are over the duration of the whole run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import requests
from rich.console import Console
from rich.table import Table
from sglang.benchmark.datasets import DatasetRow
from sglang.benchmark.serving import (
    RequestFuncOutput,
    calculate_metrics,
    flush_server_cache,
    get_auth_headers,
    get_request,
)
from sglang.benchmark.stream_metrics import validate_finish_reason
from sglang.benchmark.utils import set_ulimit
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from bench.common import (
    RESULTS,
    add_output_arguments,
    append_record,
    new_figure,
    positive_int,
    random_prompts,
    save_figure,
)
from sglang_optimal.server_process import ServerFailed, running

WORKLOADS = {"plain": 0.0, "mixed": 1.0, "half": 0.5}
"""Share of mixed requests."""

KINDS = {"plain": False, "mixed": True}

REPORTED = (
    *("completed", "request_throughput", "output_throughput", "concurrency"),
    *(f"{statistic}_{name}_ms" for name in ("ttft", "itl", "e2e_latency") for statistic in ("mean", "median", "p99")),
)
"""Fields of SGLang's BenchmarkMetrics that go into the records."""

STOP_DEADLINE = 60
"""Seconds; SGLang looks every 5 s whether it is to stop, and then ends its own processes."""


class BenchError(RuntimeError):
    """A request or the server failed; the message says how."""


def positive_rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--model-path", help="Teacher. With --base-url: its tokenizer, if the server's path is not on this machine."
    )
    server.add_argument("--student-model-path", help="Default: the teacher.")
    server.add_argument("--student-weights", choices=("separate", "shared"), help="Default: separate, two models.")
    server.add_argument("--base-url", help="Use this running server instead of starting one.")
    server.add_argument(
        "--ready-check-timeout-sec",
        type=positive_int,
        default=1800,
        help="For the server to start. Default: %(default)s.",
    )
    server.add_argument(
        "--server-log", type=Path, default=RESULTS / "serving.log", help="What it prints. Default: %(default)s."
    )
    server.add_argument(
        "--server-args", nargs=argparse.REMAINDER, default=[], help="Everything after this goes to the server."
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        type=positive_rate,
        nargs="+",
        default=[1.0, 2.0, 4.0],
        help="Requests a second, one run for each; 'inf' sends all at once. Default: 1 2 4.",
    )
    load.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="Default: all.")
    load.add_argument("--num-prompts", type=positive_int, default=32, help="Of each run. Default: %(default)s.")
    load.add_argument(
        "--input-len", type=positive_int, default=96, help="Teacher's prompt, in tokens. Default: %(default)s."
    )
    load.add_argument("--student-input-len", type=positive_int, default=64, help="Default: %(default)s.")
    load.add_argument("--output-len", type=positive_int, default=64, help="New tokens a request. Default: %(default)s.")
    load.add_argument("--temperature", type=float, default=1.0, help="Default: %(default)s.")
    load.add_argument(
        "--warmup-requests", type=positive_int, default=8, help="Of each workload, sent at once. Default: %(default)s."
    )
    load.add_argument("--seed", type=int, default=1, help="Default: %(default)s.")
    add_output_arguments(parser.add_argument_group("output"), "serving")
    args = parser.parse_args()
    if args.base_url is None:
        if args.model_path is None:
            parser.error("--model-path or --base-url is needed")
        args.student_weights = args.student_weights or "separate"
    elif args.student_model_path or args.student_weights or args.server_args:
        parser.error("--student-model-path, --student-weights and --server-args are for a server started here")
    if args.num_prompts < 2:
        parser.error("--num-prompts: at least two, for a rate and for half")
    if args.output_len < 2:
        parser.error("--output-len: there is no time between tokens with fewer than two")
    return args


# -- the server --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(args: argparse.Namespace) -> Iterator[str]:
    """Run a server until the block ends; gives its base URL."""
    argv = ["--model-path", args.model_path, "--student-weights", args.student_weights]
    if args.student_model_path:
        argv += ["--student-model-path", args.student_model_path]
    args.server_log.parent.mkdir(parents=True, exist_ok=True)
    args.server_log.unlink(missing_ok=True)
    seconds = args.ready_check_timeout_sec
    try:
        with running(
            "sglang_optimal.launch_server", [*argv, *args.server_args], args.server_log,
            seconds=seconds, headers=get_auth_headers(), grace=STOP_DEADLINE,
        ) as server:  # fmt: skip
            yield server.url
    except ServerFailed as error:
        raise BenchError(str(error)) from None


def wait_until_ready(base_url: str, seconds: float) -> None:
    """Ask for ``/health`` until it answers.

    Raises:
        BenchError: it did not in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{base_url}/health", headers=get_auth_headers(), timeout=30).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise BenchError(f"no server was ready at {base_url} after {seconds} s.")
        time.sleep(0.5)


def server_info(base_url: str) -> dict[str, Any]:
    response = requests.get(f"{base_url}/server_info", headers=get_auth_headers(), timeout=60)
    response.raise_for_status()
    return response.json()


# -- the requests ------------------------------------------------------------------------------------------------------


def make_requests(
    rng: random.Random, args: argparse.Namespace, workload: str, count: int, vocab_size: int
) -> list[DatasetRow]:
    """``count`` requests with fresh random prompts; the mixed ones among them are in random places."""
    num_mixed = round(count * WORKLOADS[workload])
    student_prompts = random_prompts(rng, num_mixed, args.student_input_len, vocab_size)
    customs = [{"custom_params": {"student_input_ids": ids}} for ids in student_prompts] + [{}] * (count - num_mixed)
    rng.shuffle(customs)
    params = {"temperature": args.temperature, "max_new_tokens": args.output_len, "ignore_eos": True}
    return [
        DatasetRow(
            prompt=prompt,
            prompt_len=args.input_len,
            output_len=args.output_len,
            extra_request_body={"sampling_params": {**params, **custom}},
        )
        for prompt, custom in zip(random_prompts(rng, count, args.input_len, vocab_size), customs, strict=True)
    ]


def is_mixed(row: DatasetRow) -> bool:
    return "custom_params" in row.extra_request_body["sampling_params"]


async def send(session: aiohttp.ClientSession, base_url: str, row: DatasetRow) -> RequestFuncOutput:
    """One request to ``/generate``, streamed.

    Raises:
        BenchError: refused, broken off, aborted, shorter than asked, or mixed when plain was asked and the reverse.
    """
    output = RequestFuncOutput(prompt_len=row.prompt_len, start_time=time.perf_counter())
    now = last = output.start_time
    meta: dict[str, Any] = {}
    body = {"input_ids": row.prompt, "stream": True, **row.extra_request_body}
    try:
        async with session.post(f"{base_url}/generate", json=body) as response:
            if response.status != 200:
                raise BenchError(f"HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                now = time.perf_counter()
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = orjson.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise BenchError(f"the stream brought an error: {event['error']}")
                meta = event["meta_info"]
                new = meta["completion_tokens"] - output.output_len
                if new == 0:
                    continue
                if ("alpha" in meta) != is_mixed(row):
                    asked, got = ("mixed", "no") if is_mixed(row) else ("plain", "an")
                    raise BenchError(f"a {asked} request was answered with {got} alpha; does this server mix?")
                if output.output_len == 0:
                    output.ttft = now - output.start_time
                else:
                    output.itl += [(now - last) / new] * new
                output.output_len += new
                output.generated_text = event["text"]
                last = now
    except aiohttp.ClientError as error:
        raise BenchError(f"the connection failed: {error!r}") from error
    if not meta.get("finish_reason"):
        raise BenchError("the stream ended before the request was finished.")
    try:
        validate_finish_reason(meta["finish_reason"], ignore_eos=True)
    except RuntimeError as error:
        raise BenchError(str(error)) from None
    if output.output_len != row.output_len:
        raise BenchError(f"{output.output_len} tokens came, {row.output_len} were asked for.")
    output.latency = now - output.start_time
    output.success = True
    return output


async def send_all(base_url: str, rows: list[DatasetRow], rate: float) -> list[RequestFuncOutput]:
    """Send each request at its time, whatever the server does; gives the outputs in the order of ``rows``.

    Raises:
        BenchError: of the first request that failed; the others are cancelled.
    """
    # A connection for each request, as many as there are: none waits for another, and none is stale.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    session = aiohttp.ClientSession(
        connector=connector,
        headers=get_auth_headers(),
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=10 * 2**20,  # an event is one line, and a long answer's events are long
    )
    try:
        async with session, asyncio.TaskGroup() as group:
            tasks = [group.create_task(send(session, base_url, row)) async for row in get_request(rows, rate)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


# -- the results -------------------------------------------------------------------------------------------------------


def summary(rows: list[DatasetRow], outputs: list[RequestFuncOutput], seconds: float, tokenizer) -> dict[str, Any]:
    """{"plain", "mixed", or both and "all": {field of REPORTED: value}}"""
    parts = {name: [i for i, row in enumerate(rows) if is_mixed(row) == mixed] for name, mixed in KINDS.items()}
    parts = {name: part for name, part in parts.items() if part}
    if len(parts) == 2:
        parts["all"] = list(range(len(rows)))
    result = {}
    for name, part in parts.items():
        metrics, _ = calculate_metrics(
            [rows[i] for i in part], [outputs[i] for i in part], seconds, tokenizer, backend="sglang"
        )
        result[name] = {field: float(getattr(metrics, field)) for field in REPORTED}
    return result


def show(console: Console, records: list[dict[str, Any]]) -> None:
    table = Table(title="TTFT, ITL and end-to-end latency in ms", title_justify="left")
    for name in ("rate", "workload", "requests"):
        table.add_column(name)
    columns = ["n", "req/s", "tok/s"]
    columns += [f"{name}\n{statistic}" for name in ("TTFT", "ITL") for statistic in ("mean", "p50", "p99")]
    columns += ["E2E\np50", "E2E\np99"]
    for name in columns:
        table.add_column(name, justify="right")
    for record in records:
        for kind, values in record["metrics"].items():
            numbers = [f"{values['completed']:.0f}", f"{values['request_throughput']:.2f}"]
            numbers.append(f"{values['output_throughput']:.1f}")
            numbers += [
                f"{values[field]:.1f}" for field in REPORTED if field.endswith("_ms") and "mean_e2e" not in field
            ]
            table.add_row(str(record["request_rate"]), record["workload"], kind, *numbers)
        table.add_section()
    console.print(table)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Throughput of each workload, and latencies of each kind of request in it, over the request rates."""
    from matplotlib.ticker import LogFormatter

    figure, ((*axes,),) = new_figure(4)
    rates = list(dict.fromkeys(str(record["request_rate"]) for record in records))
    lines = sorted({(record["workload"], kind) for record in records for kind in record["metrics"]}, reverse=True)
    titles = {"output_throughput": "output tokens/s", "ttft": "TTFT", "itl": "ITL", "e2e_latency": "end-to-end latency"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        throughput = name == "output_throughput"
        fields = {name: "o-"} if throughput else {f"median_{name}_ms": "o-", f"p99_{name}_ms": "o:"}
        for number, (workload, kind) in enumerate(lines):
            if workload == "half" and (kind == "all") != throughput:
                continue
            own = [record for record in records if record["workload"] == workload]
            places = [rates.index(str(record["request_rate"])) for record in own]
            for field, style in fields.items():
                values = [record["metrics"][kind][field] for record in own]
                label = (workload if workload == kind else f"{kind} in half") if style == "o-" else None
                axis.plot(places, values, style, color=f"C{number}", label=label)
        axis.set_title(title if throughput else f"{title}, ms: median, dotted p99", fontsize="medium")
        axis.set_xticks(range(len(rates)), rates)
        axis.set_xlabel("requests/s")
        axis.legend(fontsize="small")
        if not throughput:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
    axes[0].set_ylim(bottom=0)
    figure.tight_layout()
    save_figure(figure, path)


# -- the runs ----------------------------------------------------------------------------------------------------------


def run(console: Console, args: argparse.Namespace, base_url: str) -> list[dict[str, Any]]:
    """Warm up, then every workload at every rate; each record is written when its run is over."""
    info = server_info(base_url)
    own_tokenizer = args.model_path if args.base_url else None
    tokenizer = get_tokenizer(
        own_tokenizer or info["tokenizer_path"],
        trust_remote_code=info["trust_remote_code"],
        revision=None if own_tokenizer else info["revision"],
    )
    rng = random.Random(args.seed)
    for workload in args.workloads:
        rows = make_requests(rng, args, workload, args.warmup_requests, len(tokenizer))
        asyncio.run(send_all(base_url, rows, float("inf")))
    settings = about(args, info)
    records = []
    for rate in args.request_rate:
        for workload in args.workloads:
            rows = make_requests(rng, args, workload, args.num_prompts, len(tokenizer))
            flush_server_cache(base_url, "sglang")
            np.random.seed(args.seed)  # get_request's arrivals come from here
            outputs = asyncio.run(send_all(base_url, rows, rate))
            starts = [output.start_time for output in outputs]
            # Not until get_request ends, which also waits after the last request.
            seconds = max(output.start_time + output.latency for output in outputs) - starts[0]
            record = {
                "request_rate": rate if rate < float("inf") else "inf",
                "workload": workload,
                "duration": seconds,
                "arrival_rate": (len(rows) - 1) / (starts[-1] - starts[0]),  # as drawn, and as the client managed
                "metrics": summary(rows, outputs, seconds, tokenizer),
                **settings,
            }
            append_record(args, record)
            records.append(record)
            console.print(
                f"rate {record['request_rate']}, {workload}: {len(rows)} requests in {seconds:.1f} s, "
                f"arriving at {record['arrival_rate']:.2f}/s"
            )
    return records


def about(args: argparse.Namespace, info: dict[str, Any]) -> dict[str, Any]:
    """What every record says about the load and the server."""
    mixing = info["internal_states"][0].get("mixing", {})
    names = ("num_prompts", "input_len", "student_input_len", "output_len", "temperature", "warmup_requests", "seed")
    return {
        **{name: getattr(args, name) for name in names},
        "base_url": args.base_url,
        "server_args": args.server_args,
        "sglang_version": info["version"],
        "model_path": info["model_path"],
        "student_model_path": mixing.get("student_model_path"),
        "shared_weights": mixing.get("shared_weights"),
        "alpha": mixing.get("alpha"),
    }


def main() -> int:
    args = parse_args()
    # As Ctrl-C: the server must not be left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    set_ulimit()
    console = Console(width=max(Console().width, 140))
    try:
        with contextlib.ExitStack() as stack:
            if args.base_url:
                base_url = args.base_url.rstrip("/")
                wait_until_ready(base_url, args.ready_check_timeout_sec)
            else:
                base_url = stack.enter_context(serve(args))
            records = run(console, args, base_url)
        show(console, records)
        plot(records, args.plot)
    except (BenchError, requests.RequestException) as error:
        print(f"bench.serving: error: {error}", file=sys.stderr)
        if not args.base_url:
            print(f"The server's log: {args.server_log}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench.serving: interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
