"""Greedy output of the real engine beside the tests' transformers oracle, some engines at once.

    python -m bench.gpu.check_identity [--engines NAME ...] [--output FILE]

float32 engines must be token-identical by the tests' own comparison (ties of less than 2e-4 nats aside), with the
start-up self-check passed, every pool free afterwards, and their decode steps replayed from CUDA graphs, or not, as
asked. Their attention is Triton's, and PyTorch's own layers run where SGLang's CUDA kernels take 16-bit floats only.

bfloat16 engines run what float32 cannot: SGLang's own kernels and its other attention backends. Rounding moves
near-ties there, so how much agrees is measured, and only an engine of which less than half does is called wrong.

Each engine has a process of its own and writes one record; on a GPU all run, without one those that mean something on a
CPU. What is skipped has a record that says why.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = next(path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").is_file())
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]

from bench.gpu import processes, scheduler_hooks  # noqa: E402 (the path is set above)

SMALL = {"chunked_prefill_size": 16, "max_total_tokens": 400, "schedule_conservativeness": 0.05}
SMALL_SHARED = {**SMALL, "max_total_tokens": 520, "max_running_requests": 6}
EAGER = {"disable_cuda_graph": True, "disable_overlap_schedule": True}
NO_PREFILL_GRAPHS = {"disable_prefill_cuda_graph": True}
DRAFTS = {"mixing_mode": "speculative", "draft_tokens": 3}
AUTO = {"mixing_mode": "auto", "draft_tokens": 4}
BF16 = {"dtype": "bfloat16"}
PAGES = {"page_size": 16, "max_total_tokens": 512}
PLAUSIBLE = 0.5
"""Share of a bfloat16 engine's tokens that must come before its answers' first differences."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """arguments: of OptimalSampler. student, teacher: folders of their models, the same for shared weights. lora: the
    student is an adapter. beams: a plain beam-search request runs beside the mixed ones. gpu: means nothing on a
    CPU."""

    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    student: str = "student"
    lora: bool = False
    beams: bool = False
    gpu: bool = False
    teacher: str = "teacher"

    @property
    def judged(self) -> bool:
        return "dtype" not in self.arguments

    @property
    def small(self) -> bool:
        return "max_total_tokens" in self.arguments


def attention(backend: str) -> dict[str, Engine]:
    arguments = {**BF16, "attention_backend": backend}
    return {
        f"two-{backend}-bf16": Engine(arguments, gpu=True),
        f"shared-{backend}-bf16": Engine(arguments, "teacher", gpu=True),
        f"drafts-{backend}-bf16": Engine({**arguments, **DRAFTS}, gpu=True),
    }


# In order of worth: the last may find no time.
ENGINES: dict[str, Engine] = {
    "two": Engine(),
    "shared": Engine(student="teacher", beams=True),
    "drafts": Engine(DRAFTS),
    # one vocabulary size for both models: SGLang's graph runners then share one logits buffer
    "two-same-vocabulary": Engine(student="same-vocabulary"),
    "lora": Engine(student="teacher", lora=True),
    "auto": Engine(AUTO),
    "drafts-same-vocabulary": Engine(DRAFTS, "same-vocabulary"),
    "two-no-prefill-graphs": Engine(NO_PREFILL_GRAPHS, gpu=True),
    "shared-no-prefill-graphs": Engine(NO_PREFILL_GRAPHS, "teacher", beams=True, gpu=True),
    "drafts-no-prefill-graphs": Engine({**DRAFTS, **NO_PREFILL_GRAPHS}, gpu=True),
    "two-eager-no-overlap": Engine(EAGER),
    "shared-eager-no-overlap": Engine(EAGER, "teacher"),
    "drafts-eager-no-overlap": Engine({**DRAFTS, **EAGER}),
    "two-small-pools": Engine(SMALL),
    "shared-small-pools": Engine(SMALL_SHARED, "teacher"),
    "two-pages": Engine({**SMALL, **PAGES}),
    "shared-pages": Engine({**SMALL_SHARED, **PAGES}, "teacher"),
    "drafts-pages": Engine({**SMALL, **PAGES, **DRAFTS}),
    "vision": Engine(student="vision-student", teacher="vision"),
    "recurrent-bf16": Engine({**BF16, "max_running_requests": 40}, "recurrent-student", gpu=True, teacher="recurrent"),
    "recurrent-shared-bf16": Engine({**BF16, "max_running_requests": 40}, "recurrent", gpu=True, teacher="recurrent"),
    "recurrent-eager-bf16": Engine(
        {**BF16, **EAGER, "max_running_requests": 40}, "recurrent-student", gpu=True, teacher="recurrent"
    ),
    # What there is no CPU implementation of: caps on attention scores, latent attention, Qwen3-Next, Mamba.
    **{
        f"{family}-bf16": Engine(BF16, f"{family}-student", gpu=True, teacher=family)
        for family in ("gemma2-caps", "deepseek-v2")
    },
    **{
        f"{family}-bf16": Engine({**BF16, "max_running_requests": 40}, f"{family}-student", gpu=True, teacher=family)
        for family in ("qwen3-next", "falcon-h1")
    },
    "two-bf16": Engine(BF16, gpu=True),
    "drafts-bf16": Engine({**DRAFTS, **BF16}, gpu=True),
    **attention("flashinfer"),
    **attention("fa3"),
}


# -- models ------------------------------------------------------------------------------------------------------------


def make_models(folder: Path) -> None:
    from recurrent_models import GPU_FAMILIES as RECURRENT
    from recurrent_models import build_tiny_recurrent_model
    from tiny_models import GPU_FAMILIES, build_lora_adapter, build_tiny_tokenizer_model
    from vision_models import build_tiny_vision_model

    if (folder / "done").is_file():
        return
    build_tiny_tokenizer_model(folder / "teacher", seed=1)
    # Another shape, so that nothing of one model's KV cache could serve the other's, and a padded vocabulary.
    build_tiny_tokenizer_model(folder / "student", seed=2, hidden_size=32, num_layers=1, vocab_size=80)
    build_tiny_tokenizer_model(folder / "same-vocabulary", seed=2, hidden_size=32, num_layers=1)
    for role, seed, layers in (("", 4, 4), ("-student", 5, 2)):
        build_tiny_recurrent_model(folder / f"recurrent{role}", seed=seed, family="qwen3.5", num_layers=layers)
        build_tiny_vision_model(folder / f"vision{role}", seed=seed, family="qwen3-vl", num_layers=layers)
    for family in RECURRENT:
        build_tiny_recurrent_model(folder / family, seed=8, family=family, num_layers=4)
        build_tiny_recurrent_model(folder / f"{family}-student", seed=9, family=family, num_layers=2)
    for family in GPU_FAMILIES:
        build_tiny_tokenizer_model(folder / family, seed=6, family=family)
        build_tiny_tokenizer_model(folder / f"{family}-student", seed=7, family=family, hidden_size=32, num_layers=1)
    try:
        build_lora_adapter(folder / "teacher", folder / "adapter", folder / "merged", seed=3)
    except ImportError as error:
        (folder / "no-adapter").write_text(f"peft is needed for the adapter: {error}")
    (folder / "done").touch()


def without(name: str, folder: Path) -> str | None:
    """Why an engine cannot or need not run here; None: it runs."""
    import torch

    from bench.gpu.check_environment import without_attention

    engine = ENGINES[name]
    if engine.gpu and not torch.cuda.is_available():
        return "no GPU"
    if engine.lora and (folder / "no-adapter").is_file():
        return (folder / "no-adapter").read_text()
    return without_attention(engine.arguments["attention_backend"]) if "attention_backend" in engine.arguments else None


# -- requests ----------------------------------------------------------------------------------------------------------


RETRACTED = "more than the pools hold"


def batches(engine: Engine) -> dict[str, list]:
    """Name and cases of each call: mixed and plain, short and long, and prompts as long as a captured prefill."""
    import harness

    found = {
        f"{mixed} mixed, {plain} plain": harness.random_cases(seed, mixed, plain)
        for seed, mixed, plain in ((1, 1, 0), (2, 10, 4), (3, 0, 5), (7, 24, 8))
    }
    if engine.small:
        found[RETRACTED] = harness.random_cases(6, 9, 3, longest=25, tokens=(60, 70))
        for case in found[RETRACTED]:
            case.bias = {2: -100.0}  # no end of text, and no reservation of the whole length either
        return found
    found["long prompts"] = harness.random_cases(8, 6, 3, longest=300)
    rng = random.Random(9)
    # Token counts that SGLang captures a prefill for: no padding, alone and as the sum of a batch.
    for count, teacher, student in ((1, 256, 128), (1, 64, 48), (4, 32, 16)):
        found[f"{count} of {teacher} and {student} tokens"] = [
            harness.Case(harness.random_ids(rng, teacher), harness.random_ids(rng, student), 8) for _ in range(count)
        ]
    return found


def agreement(harness, oracle, cases: list, outputs: list[dict]) -> dict[str, Any]:
    """How many tokens come before each answer's first difference, and how far the alphas of those are off."""
    same = total = 0
    worst = 0.0
    for case, output in zip(cases, outputs, strict=True):
        expected = harness.answer(oracle, case)
        ids = expected if case.student is None else expected.token_ids
        total += len(ids)
        for i, (got, token) in enumerate(zip(output["output_ids"], ids, strict=False)):
            if got != token:
                break
            same += 1
            if case.student is not None:
                worst = max(worst, abs(output["meta_info"]["alpha"][i] - expected.alphas[i]))
    return {"tokens": total, "before_first_difference": same, "largest_alpha_difference": worst}


def compared(harness, oracle, cases: list, outputs: list[dict], judged: bool) -> dict[str, Any]:
    found = agreement(harness, oracle, cases, outputs)
    if judged:
        found["identical"] = True
        try:
            harness.check_all(oracle, cases, outputs)
        except AssertionError as error:
            found.update(identical=False, why=str(error)[:400] or traceback.format_exc()[-400:])
    return found


# -- beam search -------------------------------------------------------------------------------------------------------

BEAMS = {"beam_width": 3, "n": 2, "max_new_tokens": 12, "ignore_eos": True}


def best_beams(oracle, prompt: list[int]) -> list[tuple[list[int], float]]:
    """The ``n`` best of the teacher's beams for BEAMS, with their log-probabilities, as plainly as possible."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(BEAMS["max_new_tokens"]):
        grown = []
        for ids, score in beams:
            best = oracle.next_logits(prompt, prompt[:1], ids)[0].log_softmax(-1).topk(BEAMS["beam_width"])
            tokens, gains = best.indices.tolist(), best.values.tolist()
            grown += [([*ids, token], score + gain) for token, gain in zip(tokens, gains, strict=True)]
        beams = sorted(grown, key=lambda beam: -beam[1])[: BEAMS["beam_width"]]
    return beams[: BEAMS["n"]]


def run_beams(harness, oracle, sampler) -> dict[str, Any]:
    """Two beam searches while mixed and plain requests run: each must give what it gives alone."""
    rng = random.Random(10)
    cases = harness.random_cases(11, 6, 2, tokens=(16, 24))
    prompts = [harness.random_ids(rng, length) for length in (20, 45)]

    async def everything() -> list[dict]:
        ask = sampler.engine.async_generate
        searches = [ask(input_ids=prompt, sampling_params=dict(BEAMS)) for prompt in prompts]
        others = [ask(input_ids=case.teacher, sampling_params=case.params()) for case in cases]
        return await asyncio.gather(*searches, *others)

    outputs = sampler.engine.loop.run_until_complete(everything())
    found = {"batch": "beam search beside 6 mixed, 2 plain"}
    found.update(compared(harness, oracle, cases, outputs[len(prompts) :], judged=True))
    for prompt, output in zip(prompts, outputs, strict=False):
        expected = best_beams(oracle, prompt)
        got = output["meta_info"].get("beam_results", [])
        ids = [beam["output_ids"] for beam in got]
        scores = [beam["meta_info"].get("sequence_score") for beam in got]
        # SGLang's score is the mean; where two beams are as likely, either may come first.
        near = len(got) == len(expected) and all(
            abs(score - total / len(tokens)) < 1e-3 for score, (tokens, total) in zip(scores, expected, strict=True)
        )
        if ids != [tokens for tokens, _ in expected] and not near:
            found.update(identical=False, why=f"beams {ids} of scores {scores}, expected {expected}"[:600])
    return found


# -- one engine --------------------------------------------------------------------------------------------------------


def has_self_check() -> bool:
    """Whether this version of the package looks at itself when it starts."""
    from sglang_optimal.config import SETTINGS

    return "mixing_self_check" in SETTINGS


@contextlib.contextmanager
def started(name: str, folder: Path, **more: Any) -> Iterator[Any]:
    import harness
    import torch

    engine = ENGINES[name]
    arguments: dict[str, Any] = {"log_level": "warning", **engine.arguments, **more}
    if has_self_check():
        arguments["mixing_self_check"] = "on"  # also without a GPU
    setups = [scheduler_hooks.count_forwards]
    if torch.cuda.is_available():
        # Several engines take their share of what is free when each starts.
        arguments.setdefault("mem_fraction_static", 0.6)
        if engine.judged:
            arguments["attention_backend"] = "triton"  # of SGLang's, the one that takes float32
            setups.append(scheduler_hooks.layers_take_float32)
    if engine.lora:
        arguments["student_lora_path"] = str(folder / "adapter")
    with (
        scheduler_hooks.in_schedulers(*setups),
        harness.start((folder / engine.teacher, folder / engine.student), **arguments) as sampler,
    ):
        yield sampler


def since(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Forwards between two counts: those of the self-check are not the requests'."""
    return {
        name: {kind: n - before.get(name, {}).get(kind, 0) for kind, n in kinds.items()}
        for name, kinds in after.items()
    }


def graphs(engine: Engine, forwards: dict[str, dict[str, int]]) -> str:
    """Whether what ran was replayed as asked: "as asked", or what was not."""
    decodes = {name: kinds for name, kinds in forwards.items() if name.endswith(" decode")}
    prefills = {name: kinds for name, kinds in forwards.items() if name.endswith(" prefill")}
    if engine.arguments.get("disable_cuda_graph"):
        wrong = [name for name, kinds in forwards.items() if kinds["graph"]]
        return f"replayed, though eager was asked for: {', '.join(wrong)}" if wrong else "as asked"
    wrong = [name for name, kinds in decodes.items() if not kinds["graph"]]
    if wrong:
        return f"never replayed: {', '.join(wrong)}"
    if engine.arguments.get("disable_prefill_cuda_graph") and any(kinds["graph"] for kinds in prefills.values()):
        return "prefills were replayed, though they were to be eager"
    return "as asked"


def one(name: str, folder: Path, port: int) -> dict[str, Any]:
    """The record of one engine."""
    import harness
    import torch
    from oracle import MixedOracle

    engine, gpu = ENGINES[name], torch.cuda.is_available()
    record: dict[str, Any] = {"engine": name, "judged": engine.judged}
    record["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    oracle = MixedOracle(folder / engine.teacher, folder / ("merged" if engine.lora else engine.student))
    calls = batches(engine)
    # The oracle's answers while the engine starts.
    answers = threading.Thread(
        target=lambda: [harness.answer(oracle, case) for cases in calls.values() for case in cases]
    )
    answers.start()
    start = time.perf_counter()
    with started(name, folder, port=port, nccl_port=port + 77) as sampler:
        record["start_s"] = round(time.perf_counter() - start, 1)
        info = sampler.engine.get_server_info()
        record["attention_backend"] = info.get("attention_backend")
        state = info["internal_states"][0]
        record["self_check"] = state["mixing"].get("self_check") if has_self_check() else "this version has none"
        answers.join()
        record["runs"] = []
        for what, cases in calls.items():
            start = time.perf_counter()
            # SGLang reserves the full length of requests that ignore their end, and never has to retract them.
            outputs = harness.run(sampler, cases, **({"ignore_eos": False} if what == RETRACTED else {}))
            seconds = round(time.perf_counter() - start, 2)
            found = compared(harness, oracle, cases, outputs, engine.judged)
            if what == RETRACTED:
                found["retractions"] = sum(output["meta_info"]["num_retractions"] for output in outputs)
                if not found["retractions"]:
                    found.update(identical=False, why="nothing was retracted")
            record["runs"].append({"batch": what, "s": seconds, **found})
        if engine.beams:
            record["runs"].append(run_beams(harness, oracle, sampler))
        after = sampler.engine.get_server_info()["internal_states"][0]
        record["forwards"] = since(state["forwards"], after["forwards"])
        record["graphs"] = graphs(engine, record["forwards"]) if gpu else "no GPU"
        try:
            harness.check_pools(sampler)
            record["pools_free"] = True
        except AssertionError as error:
            record["pools_free"] = str(error)[:300]
    record["ok"] = is_ok(record)
    return record


def is_ok(record: dict[str, Any]) -> bool:
    runs = record["runs"]
    if record["judged"]:
        right = all(run["identical"] for run in runs)
    else:
        right = sum(r["before_first_difference"] for r in runs) >= PLAUSIBLE * sum(r["tokens"] for r in runs)
    checked = record["self_check"] is not None
    return right and checked and record["pools_free"] is True and record["graphs"] in ("as asked", "no GPU")


# -- all of them -------------------------------------------------------------------------------------------------------


def every(names: list[str], folder: Path, logs: Path, at_once: int, limit: float) -> Iterator[dict[str, Any]]:
    """Records, in the order in which the engines end; ``limit``: seconds for all."""
    skipped = {name: why for name in names if (why := without(name, folder))}
    yield from ({"engine": name, "skipped": why} for name, why in skipped.items())
    # Near-float32 products in Triton: its default, tf32, is coarser than what the comparison allows.
    environment = {"TRITON_F32_DEFAULT": os.environ.get("TRITON_F32_DEFAULT", "tf32x3")}
    end = processes.end_of(limit)
    jobs = [
        processes.Job(
            name,
            [sys.executable, __file__, "--one", name, "--models", str(folder), "--port", str(31000 + 150 * i)],
            limit * 2 / 3,
            logs / f"identity-{name}.log",
            environment,
        )
        for i, name in enumerate(ENGINES)
        if name in names and name not in skipped
    ]
    for ended in processes.run_all(jobs, at_once, ROOT, end):
        if ended.status == processes.NO_TIME:
            yield {"engine": ended.job.name, "skipped": "no time was left"}
        else:
            yield {"engine": ended.job.name, "ok": False, **processes.result(ended)}


def parse_args() -> argparse.Namespace:
    description = __doc__.splitlines()[0]
    return processes.engine_parser(
        description, ENGINES, output="identity.jsonl", models="tiny", port=31000, limit=1800, cores=3
    ).parse_args()


def main() -> int:
    args = parse_args()
    make_models(args.models)
    if args.one:
        processes.give_result(lambda: one(args.one, args.models, args.port))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with args.output.open("a") as file:  # the last record of an engine counts
        for record in every(args.engines, args.models, args.logs, args.at_once, args.limit):
            file.write(json.dumps(record) + "\n")
            file.flush()
            wrong += record.get("ok") is False
            print(f"{record['engine']}: {verdict(record)}", flush=True)
    print(f"records: {args.output}")
    return int(wrong > 0)


def verdict(record: dict[str, Any]) -> str:
    if "skipped" in record:
        return f"skipped: {record['skipped']}"
    if record["ok"]:
        return "token-identical" if record["judged"] else "agrees as far as rounding lets it"
    return (
        f"NOT OK: {record.get('error') or json.dumps({k: record[k] for k in ('graphs', 'pools_free', 'self_check')})}"
    )


if __name__ == "__main__":
    sys.exit(main())
