"""Two engines in one process, and two servers started from one: each keeps its own student, defaults and processes."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
from harness import SMALL, Case, check_all, check_pools, random_cases, run, start
from sglang.srt.entrypoints.engine import Engine

from sglang_optimal import OptimalSampler
from sglang_optimal.config import MixingConfig
from sglang_optimal.runtime.entrypoints import engine

METHOD = {"alpha_method": "ess_balance", "alpha_min": 0.2}
FIXED = {"fixed_alpha": 0.3}


def cases_of(seed: int) -> list[Case]:
    """Mixed and plain requests that leave alpha to the engine's defaults."""
    return [dataclasses.replace(case, alpha={}) for case in random_cases(seed, mixed=5, plain=2, longest=30)]


def check(oracle, sampler: OptimalSampler, alpha: dict, seed: int) -> None:
    cases = cases_of(seed)
    outputs = run(sampler, cases)
    check_all(oracle, [dataclasses.replace(case, alpha=alpha if case.student else {}) for case in cases], outputs)


def test_each_mixes_as_it_was_told(tiny_pair, tiny_oracle, self_oracle):
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with start(tiny_pair, **METHOD, max_total_tokens=2000) as separate:
            with OptimalSampler(str(tiny_pair[0]), **SMALL, **FIXED) as shared:
                for seed in (1, 2):
                    check(tiny_oracle, separate, METHOD, seed)
                    check(self_oracle, shared, FIXED, seed)
                with pytest.raises(ValueError, match="mixing_mode: an engine that drafts"):
                    start(tiny_pair, mixing_mode="speculative")
            # The one that is left has its processes still, and its own student.
            check(tiny_oracle, separate, METHOD, 3)
            assert check_pools(separate)["teacher_pool"]["size"] == 2000
        assert bystander.poll() is None
        with start(tiny_pair, **FIXED, mixing_mode="speculative") as drafting:
            check(tiny_oracle, drafting, FIXED, 4)
    finally:
        bystander.kill()


def test_what_a_failed_start_leaves_does_not_become_garbage(monkeypatch):
    """As garbage a tokenizer manager can stop the program: its ZMQ context waits for sockets that nobody closes."""

    class Manager:
        pass

    made = []

    def make(config):
        def init(server_args, port_args):
            manager = Manager()
            made.append(weakref.ref(manager))
            return manager, None

        return init

    def start(self, server_args):
        atexit.register(self.shutdown)  # as SGLang's, before it starts anything
        self.tokenizer_manager = None
        self.init_tokenizer_manager_func(None, None)
        raise RuntimeError("Rank 0 scheduler died during initialization (exit code: 1).")

    monkeypatch.setattr(engine, "tokenizer_manager_init", make)
    monkeypatch.setattr(Engine, "__init__", start)
    monkeypatch.setattr(Engine, "shutdown", lambda self: None)
    with pytest.raises(RuntimeError, match="scheduler died"):
        engine.MixedEngine(SimpleNamespace(dp_size=1, tokenizer_worker_num=1, detokenizer_worker_num=1), MixingConfig())
    gc.collect()
    assert made[0]() is not None


@pytest.mark.slow
def test_two_servers_from_one_process(tiny_pair, tiny_oracle, self_oracle):
    from sglang_optimal.lang import Runtime

    teacher, student = map(str, tiny_pair)
    one = Runtime(teacher, student, **SMALL, **METHOD)
    try:
        other = Runtime(teacher, teacher, **SMALL, **FIXED)
        try:
            for oracle, runtime, alpha in ((tiny_oracle, one, METHOD), (self_oracle, other, FIXED)) * 2:
                cases = cases_of(5)
                body = {
                    "input_ids": [case.teacher for case in cases],
                    "sampling_params": [case.params() for case in cases],
                }
                outputs = _post(runtime.url, body)
                check_all(oracle, [dataclasses.replace(c, alpha=alpha if c.student else {}) for c in cases], outputs)
        finally:
            other.shutdown()
        assert len(_post(one.url, {"input_ids": [[8, 9]], "sampling_params": [{"max_new_tokens": 2}]})) == 1
    finally:
        one.shutdown()


def _post(url: str, body: dict) -> list[dict]:
    import httpx

    answer = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()
