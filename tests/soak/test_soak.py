"""Minutes of everything at once on pools that are far too small: nothing may be lost, wrong, twice, or kept.

``make soak`` runs it for half an hour, ``make test`` for 30 seconds; SOAK_SECONDS is the time of all modes together.
SGLang's own leak checkers run after every step.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
from expectations import Expectations
from gpu_like import faults
from harness import SMALL
from ledger import Ledger
from operations import Weights
from oracle import MixedOracle
from recurrent_models import ENVIRONMENT, build_tiny_recurrent_model
from serving import as_argv, serve
from soak import soak
from tiny_models import build_tiny_tokenizer_model

SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
REPORTS = os.environ.get("SOAK_REPORTS")
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
}
# About three requests fit; prompts come in several chunks.
TIGHT = {
    **SMALL,
    "max_total_tokens": 420,
    "context_length": 256,
    "max_running_requests": 12,
    "chunked_prefill_size": 24,
    "schedule_conservativeness": 0.05,
}
PAGES = {"page_size": 16, "chunked_prefill_size": 32}
MODES = {
    "two-models": (0.2, {}),
    "shared-weights": (0.1, {"max_total_tokens": 640}),
    "drafts": (0.1, {"mixing_mode": "speculative", "draft_tokens": 3}),
    "pages": (0.05, {**PAGES, "max_total_tokens": 480}),
    "shared-pages": (0.05, {**PAGES, "max_total_tokens": 720}),
    "drafts-pages": (0.05, {**PAGES, "max_total_tokens": 480, "mixing_mode": "speculative", "draft_tokens": 3}),
    "student-pool-is-the-bottleneck": (0.1, {"student_max_total_tokens": 220}),
    "no-overlap": (0.1, {"disable_overlap_schedule": True}),
    "lora-student": (0.1, {"max_total_tokens": 640}),
    "recurrent": (0.05, {"chunked_prefill_size": 64}),
    "shared-recurrent": (0.05, {"chunked_prefill_size": 64, "max_total_tokens": 640}),
    "asleep": (0.05, {"enable_memory_saver": True, "enable_weights_cpu_backup": True}),
}
SHORT_MODES = ("shared-weights", "drafts")
"""What a short soak is made of, in equal parts: every mode costs a start of a server."""


def seconds_of(mode: str) -> float:
    if SECONDS < 600:
        return SECONDS / len(SHORT_MODES) if mode in SHORT_MODES else 0.0
    return SECONDS * MODES[mode][0]


def not_met(ledger: Ledger, seconds: float) -> list[str]:
    """What a soak is for and this one has not had."""
    had = {
        "retractions": ledger.counts["retractions"] > 0,
        "answers equal to the oracle's": ledger.counts["answers equal to the oracle's"] > 0,
        "rests with all slots accounted for": ledger.counts["rests with all slots accounted for"] >= seconds / 40,
        "aborted requests": ledger.faults["abort"] > 0,
        "disconnected users": ledger.faults["disconnect"] > 0,
    }
    return [name for name, met in had.items() if not met]


@pytest.mark.parametrize("mode", [mode for mode in MODES if seconds_of(mode)])
def test_soak(mode, tiny_pair, tmp_path, request):
    teacher, student = tiny_pair
    build, shape = build_tiny_tokenizer_model, {"hidden_size": 32, "num_layers": 1, "vocab_size": 80}
    if "recurrent" in mode:
        build, shape = partial(build_tiny_recurrent_model, family="qwen3.5"), {"hidden_size": 32, "num_layers": 2}
        teacher = build(tmp_path / "teacher", seed=4)
        student = build(tmp_path / "first", seed=5, **shape)
    argv = ["--model-path", str(teacher), *as_argv({**TIGHT, **MODES[mode][1]})]
    folders, oracles = {"first": student}, {}
    if mode.startswith("shared"):
        own = mode == "shared-recurrent"
        oracles["first"] = MixedOracle(teacher, teacher) if own else request.getfixturevalue("self_oracle")
    elif mode == "lora-student":
        adapter, oracles["first"] = request.getfixturevalue("lora_adapter")
        argv += ["--student-lora-path", str(adapter)]
    else:
        argv += ["--student-model-path", str(student)]
        folders["second"] = build(tmp_path / "second", seed=7, **shape)
        first = MixedOracle(teacher, student) if mode == "recurrent" else request.getfixturevalue("tiny_oracle")
        oracles = {"first": first, "second": MixedOracle(teacher, folders["second"])}
    expectations = Expectations(oracles, seed=29)
    expectations.grow(16, 40)
    log = tmp_path / "server.log"
    module, environment = "sglang_optimal.launch_server", {**STRICT, **ENVIRONMENT}
    sleeps = mode == "asleep"  # which a CPU cannot
    if sleeps:
        (tmp_path / "fault").touch()
        module = "gpu_like.serve"
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), faults.FILE: str(tmp_path / "fault")}
    with serve(module, argv, log, api_key="soak", environment=environment) as client:
        port = str(client.base_url.port)
        (server,) = [
            p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or []) and p.ppid() == os.getpid()
        ]

        def processes() -> list[psutil.Process]:
            return [server, *server.children(recursive=True)]

        seconds, headers, ledger = seconds_of(mode), dict(client.headers), Ledger()
        target = str(client.base_url), headers, processes, expectations, Weights(folders), seconds, ledger
        try:
            asyncio.run(soak(*target, missing=lambda: not_met(ledger, seconds), sleeps=sleeps))
        finally:
            report = ledger.report(mode)
            print(f"\n{json.dumps(report, indent=1)}")
            if REPORTS:
                ledger.write(mode, Path(REPORTS))
        assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    assert not ledger.violations, "\n".join(ledger.violations) + "\n" + log.read_text(errors="replace")[-4000:]
    assert not not_met(ledger, seconds), "it was not what it says"
    if SECONDS >= 600:  # a shorter one is all warming up
        assert ledger.memory_growth() < 64, ledger.memory
