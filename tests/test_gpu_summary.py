"""What the GPU checks make of their records: verdicts, what was not run, and where a trace shows the host waiting."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest

from bench import common, profile
from bench.gpu import check_host_waits, make_models, processes, run_checks, summary, traces
from bench.gpu.summary import FAIL, NOT_JUDGED, NOT_RUN, PASS


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": value - 0.01, "max": value + 0.01}


def throughput(run_name: str, batch: int, **ratios: float) -> dict:
    ratios = {name.replace("_over_", "/"): spread(value) for name, value in ratios.items()}
    if "shared" in ratios:
        ratios["shared/(2t/2)"] = ratios.pop("shared")
    about = {"bench": "throughput", "run_name": run_name, "device": "Card A"}
    return {**about, "batch_size": batch, "ratios": ratios}


@pytest.fixture
def folder(tmp_path):
    """Writes records as the checks do: ``folder(bench=[...], environment={...})``."""

    def write(**content) -> Path:
        names = {"bench": "bench.jsonl", "results": "results.jsonl", "identity": "identity.jsonl"}
        for name, records in content.items():
            if name in names:
                (tmp_path / names[name]).write_text("".join(json.dumps(record) + "\n" for record in records))
            else:
                (tmp_path / f"{name}.json").write_text(json.dumps(records))
        return tmp_path

    return write


def verdicts(folder: Path, name: str) -> dict[str, str]:
    """Verdict of each line of a bar, by batch size or engine."""
    bars = summary.bars(summary.Findings.read([folder]))
    found = {bar.where.removeprefix("batch "): bar.verdict for bar in bars if bar.name.startswith(name)}
    assert found, f"no bar is called {name}"
    return found


def test_nothing_was_run(tmp_path):
    bars = summary.bars(summary.Findings.read([tmp_path]))
    assert {bar.verdict for bar in bars} == {NOT_RUN} and all(bar.measured is None for bar in bars)
    assert len({(bar.name, bar.where) for bar in bars}) == len(bars)
    page = summary.page(summary.Findings.read([tmp_path]), checks=("identity",))
    assert "Card: **unknown**" in page and "| identity | NOT RUN |" in page


def test_rates(folder):
    where = folder(
        bench=[
            throughput(summary.TWO_MODELS, 1, m_over_L=0.951, t_over_stock=0.989),
            throughput(summary.TWO_MODELS, 8, m_over_L=0.949, t_over_stock=0.99),
            throughput(summary.SHARED, 1, m_over_L=0.5, shared=0.95),
            throughput(summary.SHARED, 8, shared=0.9),
            throughput("another run", 32, m_over_L=0.1, shared=0.1),
        ]
    )
    rest = {"32": NOT_RUN, "128": NOT_RUN, "256": NOT_RUN}
    assert verdicts(where, "m/L") == {"1": PASS, "8": FAIL, **rest}
    assert verdicts(where, "t/stock") == {"1": FAIL, "8": PASS, **rest}
    assert verdicts(where, "shared/(2t/2)") == {"1": PASS, "8": FAIL, **rest}


def test_the_last_of_several_counts(folder):
    bench = [throughput(summary.TWO_MODELS, 1, m_over_L=value) for value in (0.5, 0.99)]
    assert verdicts(folder(bench=bench), "m/L")["1"] == PASS


def test_share_of_a_step(folder):
    bench = [
        {
            "benchmark": "profile",
            "mode": mode,
            "batch_size": batch,
            "clock": "device",
            "clocks": {"device": {"mixing_percent": share}},
        }
        for mode, batch, share in (("two-model", 1, 2.9), ("plain", 32, 0.0), ("two-model", 256, 3.1))
    ]
    assert verdicts(folder(bench=bench), "mixing, share") == {"1": PASS, "32": NOT_RUN, "256": FAIL}


def test_a_profile_names_its_card(tmp_path):
    """Its record once had the device's times where the card's name belongs, and no page could be written."""
    args = argparse.Namespace(run_name=summary.TWO_MODELS, result_filename=tmp_path / "bench.jsonl", server_args=[])
    for name in ("model_path", "student_model_path", "input_len", "student_input_len", "output_len", "temperature"):
        setattr(args, name, 1)
    args.alpha_method = "kl_symmetry"
    step = {"batch": 1, "mixed": True, "graph": True, "device": {"mixing": 0.5, "teacher forward": 9.5}}
    common.append_record(args, profile.record(args, "two-model", 1, [{**step, "host": {"mixing": 0.1}}]))
    found = summary.Findings.read([tmp_path])
    assert found.devices() == [common.device_name()] and common.device_name() in summary.page(found)
    assert verdicts(tmp_path, "mixing, share")["1"] == FAIL
    with pytest.raises(ValueError, match="device"):
        common.append_record(args, {"device": {}})


def test_mixing_alone(folder):
    def kernel(batch: int, over_read: float) -> dict:
        size = 2 * batch * 151_936 * 2
        return {
            "bench": "mixing", "batch_size": batch, "mix_over_read": over_read, "bytes_read": size,
            "mix_ms": spread(3 * size / 2e12 * 1e3),
        }  # fmt: skip

    alpha = {"bench": "alpha", "batch_size": 32, "fused_over_read": 9.0, "fused_alpha_error": 2e-4}
    where = folder(
        bench=[kernel(1, 9.0), kernel(32, 1.9), kernel(128, 2.1), alpha, {"bench": "alpha", "compile_s": 1.0}],
        environment={"copy": {"gb_per_s_read_and_written": 2000.0}},
    )
    rest = {"8": NOT_RUN, "256": NOT_RUN}
    assert verdicts(where, "mixing over reading both logits, device") == {
        "1": NOT_JUDGED, "32": PASS, "128": FAIL, **rest,
    }  # fmt: skip
    assert verdicts(where, "mixing over reading both logits, host included")["32"] == NOT_JUDGED
    assert verdicts(where, "alpha's error")["32"] == FAIL
    bars = summary.bars(summary.Findings.read([where]))
    at_bandwidth = [bar for bar in bars if "full bandwidth" in bar.name and bar.where == "batch 32"]
    assert at_bandwidth[0].measured == "3.00" and at_bandwidth[0].verdict == NOT_JUDGED


def test_host_waits(folder):
    waits = {"stock": 1.0, "lockstep": 1.05, "shared": 2.0, "drafts": 2.0}
    records = {
        name: {"engine": name, "device": "Card A", "waits": n, "pageable_to_host": 0.0, "ours": 0.0}
        for name, n in waits.items()
    }
    judged = check_host_waits.judged(records)
    assert verdicts(folder(host_waits=judged), "host waits") == {"lockstep": PASS, "shared": FAIL, "drafts": PASS}
    assert "SGLang's own code" in judged["drafts"]["verdict"]
    records["drafts"]["ours"] = 0.5
    records["lockstep"]["pageable_to_host"] = 1.0
    records["shared"] = {"engine": "shared", "error": "ended with status 2"}
    judged = check_host_waits.judged(records)
    assert verdicts(folder(host_waits=judged), "host waits") == {"lockstep": FAIL, "shared": FAIL, "drafts": FAIL}
    del records["stock"]
    judged = check_host_waits.judged(records)
    assert verdicts(folder(host_waits=judged), "host waits")["lockstep"] == NOT_JUDGED
    cpu = {name: {**record, "device": "cpu"} for name, record in records.items()}
    assert check_host_waits.judged(cpu)["lockstep"]["verdict"] == "not judged: no GPU"


def test_page(folder):
    identity = {
        "engine": "two", "judged": True, "ok": True, "device": "Card B", "start_s": 20.0, "graphs": "as asked",
        "attention_backend": "triton", "self_check": {"seconds": 1.25}, "pools_free": True,
        "forwards": {"teacher prefill": {"graph": 3, "eager": 1}},
        "runs": [{"tokens": 9, "before_first_difference": 9}],
    }  # fmt: skip
    where = folder(
        bench=[throughput(summary.TWO_MODELS, 1, m_over_L=0.96)],
        results=[
            {"check": "identity", "rc": 0, "seconds": 91.2},
            {"check": "alpha", "rc": 124, "seconds": 75.0},
            {"check": "drafts", "rc": None, "seconds": 0, "why": "3 s of the budget left, 200 needed"},
        ],
        identity=[identity, {"engine": "two-fa3-bf16", "skipped": "no FA3 | here"}],
    )
    page = summary.page(summary.Findings.read([where]), checks=("identity", "profile"))
    assert "Card: **Card A, Card B**" in page and "more than one device" in page
    assert "| identity | pass | 91 |" in page and "| alpha | FAIL (status 124) | 75 |" in page
    assert "| drafts | NOT RUN: 3 s of the budget left, 200 needed |" in page and "| profile | NOT RUN |" in page
    assert (
        "| m/L: two models in lockstep beside their limit L | batch 1 | ≥ 0.95 | 0.960 (0.950–0.970) | pass |" in page
    )
    assert "1 of 1 engines ok" in page and "replayed by: two." in page and "two 1.2 s" in page
    assert "| two-fa3-bf16 | NOT RUN: no FA3 \\| here |" in page


def test_several_folders(tmp_path, folder):
    first = folder(
        results=[{"check": "alpha", "rc": 0, "seconds": 1.0}, {"check": "identity", "rc": 1, "seconds": 1.0}]
    )
    second = tmp_path / "second"
    second.mkdir()
    lines = [
        {"check": "alpha", "rc": None, "seconds": 0, "why": "no time"},
        {"check": "identity", "rc": 0, "seconds": 2},
    ]
    (second / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"check": "cut')
    found = summary.Findings.read([first, second])
    assert found.results["alpha"]["rc"] == 0 and found.results["identity"]["seconds"] == 2


# -- traces ------------------------------------------------------------------------------------------------------------


def event(category: str, name: str, begin: float, duration: float = 1.0, thread: int = 1, **args) -> dict:
    where = {"pid": 7, "tid": thread, "ts": begin, "dur": duration}
    return {"ph": "X", "cat": category, "name": name, **where, "args": args}


def test_waits_of_a_trace():
    """Two steps count, from 20 to 40: what lies before, after, and in other threads does not."""
    steps = [event("user_annotation", "step", begin, 5) for begin in (0, 10, 20, 30, 40)]
    functions = [
        event("python_function", "sglang/srt/managers/scheduler.py(1): event_loop", -5, 100),
        event("python_function", "/here/sglang_optimal/runtime/managers/tp_worker.py(2): forward", 21, 3),
        event("python_function", "torch/cuda/streams.py(3): synchronize", 21.5, 2),
        event("python_function", "<built-in method item>", 21.6, 1),
    ]
    calls = [
        event("cuda_runtime", "cudaEventSynchronize", begin, thread=thread)
        for begin, thread in ((5, 1), (22, 1), (28, 1), (38, 1), (45, 1), (29, 2))
    ]
    copies = [
        event("cuda_runtime", "cudaMemcpyAsync", 23, correlation=1),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 24, thread=99, correlation=1),
        event("cuda_runtime", "cudaMemcpyAsync", 25, correlation=2),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 26, thread=99, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 25, thread=2, correlation=3),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 26, thread=99, correlation=3),
    ]
    found = traces.waits({"traceEvents": [*calls, *copies, *functions, *steps, {"ph": "M"}]}, "step")
    assert found == {
        "steps": 2,
        "waits": 1.5,
        "pageable_to_host": 0.5,
        "pageable_to_device": 0.0,
        "calls": {"cudaEventSynchronize": 1.5},
        "from": {
            "/here/sglang_optimal/runtime/managers/tp_worker.py(2): forward": 0.5,
            "sglang/srt/managers/scheduler.py(1): event_loop": 1.0,
        },
        "ours": 0.5,
    }
    assert traces.waits({"traceEvents": [*calls, *steps]}, "step")["ours"] is None
    with pytest.raises(ValueError, match="too few"):
        traces.waits({"traceEvents": steps[:3]}, "step")


# -- the runner --------------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, **more) -> argparse.Namespace:
    given = {"output": tmp_path, "scratch": tmp_path, "teacher": "T", "student": "S", "drafter": "D", "at_once": 1}
    return argparse.Namespace(**{**given, "budget": 60.0, "on_gpu": False, "no_models": None, **more})


def test_commands_are_complete(tmp_path):
    """Every module that a check runs exists, and knows its arguments."""
    every = run_checks.checks(arguments(tmp_path))
    assert {check.stage for check in every.values()} == {"first", "second", "third"}
    assert all(isinstance(part, str) for check in every.values() for part in check.command)
    chosen = ["alpha", "profile", "shared-profile", "shapes", "drafts"]
    assert list(run_checks.chosen(every, ["third", "alpha"])) == chosen
    with pytest.raises(SystemExit, match="unknown nothing"):
        run_checks.chosen(every, ["nothing"])
    root = Path(run_checks.ROOT)
    for check in every.values():
        module = check.command[check.command.index("-m") + 1]
        assert module == "pytest" or (root / (module.replace(".", "/") + ".py")).is_file()


def test_what_is_not_started(tmp_path):
    args = arguments(tmp_path)
    every = run_checks.checks(args)
    reasons = {name: run_checks.reason_not_to(check, 55, args) for name, check in every.items()}
    assert reasons["throughput"] == "no GPU" and reasons["host-waits"] is None
    args = arguments(tmp_path, on_gpu=True, no_models="no tokenizer")
    assert run_checks.reason_not_to(every["throughput"], 500, args) == "no tokenizer"
    assert "60 needed" in run_checks.reason_not_to(every["identity"], 55, args)


def test_checks_at_the_same_time(tmp_path):
    every = run_checks.checks(arguments(tmp_path))
    assert all(len(group) == 1 for group in run_checks.together(every, 1))
    groups = list(run_checks.together(every, 5))
    assert [name for group in groups for name in group] == list(every)
    assert ["identity", "host-waits", "kernels", "sanitizer"] in groups and ["throughput"] in groups


def test_run(tmp_path):
    """Status, limit and reason of small commands in place of the checks'."""

    def check(code: str, limit: int = 30, **more) -> run_checks.Check:
        return run_checks.Check("first", limit, 5, [run_checks.sys.executable, "-c", code], **more)

    every = {
        "fine": check("print('limit {limit}')", gpu=False),
        "wrong": check("raise SystemExit(3)", gpu=False),
        "long": check("import time; time.sleep(60)", gpu=False),
        "on a GPU": check("", gpu=True),
    }
    args = arguments(tmp_path, budget=2.0)
    records = {r["check"]: r for r in run_checks.run(every, args, time.monotonic() + 30)}
    assert {name: record["rc"] for name, record in records.items()} == {
        "fine": 0, "wrong": 3, "long": 124, "on a GPU": None,
    }  # fmt: skip
    assert records["fine"]["tail"].startswith("limit ") and records["on a GPU"]["why"] == "no GPU"


def test_results_of_processes(tmp_path):
    """A record, an exception, a self-check that failed, and an end without a word."""
    codes = {
        "fine": "give_result(lambda: {'ok': True})",
        "raises": "give_result(lambda: 1 / 0)",
        "self-check": "print('sglang_optimal: error: self-check: wrong rows'); give_result(lambda: 1 / 0)",
        "dies": "raise SystemExit(2)",
    }
    jobs = [
        processes.Job(
            name,
            [run_checks.sys.executable, "-c", f"from bench.gpu.processes import give_result\n{code}"],
            30,
            tmp_path / name,
        )
        for name, code in codes.items()
    ]
    got = {ended.job.name: processes.result(ended) for ended in processes.run_all(jobs, 2, Path(run_checks.ROOT))}
    assert got["fine"] == {"ok": True}
    assert got["raises"]["error"].startswith("ZeroDivisionError") and "Traceback" in got["raises"]["tail"]
    assert got["self-check"]["error"] == "sglang_optimal: error: self-check: wrong rows"
    assert got["dies"]["error"] == "ended with status 2 and no result"
    late = list(processes.run_all(jobs[:1], 2, Path(run_checks.ROOT), end=0.0))
    assert [ended.status for ended in late] == [processes.NO_TIME]
    sleeps = [run_checks.sys.executable, "-c", "import time; time.sleep(60)"]
    long = [processes.Job(str(limit), sleeps, limit, tmp_path / "long") for limit in (0.5, 30)]
    ended = {e.job.name: e.status for e in processes.run_all(long, 2, Path(run_checks.ROOT), time.monotonic() + 1.5)}
    assert ended == {"0.5": processes.TIMED_OUT, "30": processes.NO_TIME}, "a hang fails; the end of all does not"
    assert processes.end_of(100.0) < time.monotonic() + 100


def test_models(tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "source" / name).write_text(name)
    make_models.make(tmp_path, (tmp_path / "nothing", tmp_path / "source"))
    for name, (hidden, *_, vocabulary, _tied) in make_models.SIZES.items():
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["hidden_size"], config["vocab_size"]) == (hidden, vocabulary)
        assert (tmp_path / name / "tokenizer.json").read_text() == "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="make model"):
        make_models.make(tmp_path, (tmp_path / "nothing",))
