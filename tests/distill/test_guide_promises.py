"""Promises of docs/distillation_guide.md, operations.md and architecture.md, and of bench/gpu/README.md, that no other
test holds and that need neither an engine nor a server."""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import json
import re
import shlex
import types
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
import yaml
from stub_server import stub_answer, stub_server
from test_filters import record, verdict

from sglang_optimal import supervise, wanted
from sglang_optimal.distill import leaks, probe_advice, server, surprise
from sglang_optimal.distill.cli import main
from sglang_optimal.distill.config import Output
from sglang_optimal.distill.filters.surprise import Surprise
from sglang_optimal.distill.records import OPTIONAL_COLUMNS, Record, schema
from sglang_optimal.distill.report import verdicts
from sglang_optimal.distill.store import RecordStore, find_shards, read_rows
from sglang_optimal.mixing import AlphaParams, mix
from sglang_optimal.names import SERIES, SIDES
from sglang_optimal.platforms import activate
from sglang_optimal.runtime.mem_cache import guest_kv
from sglang_optimal.runtime.model_executor import guest_failure as failure
from sglang_optimal.runtime.speculative import spec_worker as speculative_worker
from sglang_optimal.server_process import ServerProcess

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "sglang_optimal"


def page(name: str) -> str:
    return (REPOSITORY / name).read_text()


def words(text: str) -> str:
    return " ".join(text.split())


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence", "constant", "value"),
    [
        ("distillation_guide", "texts of 16 characters or more", leaks.LONG, 16),
        ("distillation_guide", "five starts in all", server.STARTS, 5),
        ("distillation_guide", "2,000,000 ids over its `max_new_tokens`", wanted.LARGEST_TOP_K, 2_000_000),
        ("distillation_guide", "amber above 10 %", verdicts.BOUND_SHARE, 0.1),
        ("distillation_guide", "probability below 10⁻³", surprise.RARE, 1e-3),
        ("distillation_guide", "`floor`, by default 0.001", Surprise.model_fields["floor"].default, 1e-3),
        ("distillation_guide", "gives less than 0.1 where it first stands", surprise.LEAP, 0.1),
        ("distillation_guide", "amber above 10 % of the accepted", verdicts.SURPRISE_SHARE, 0.1),
        ("distillation_guide", "none can cover more than a tenth of the problems beyond", probe_advice.MARGIN, 0.1),
        ("distillation_guide", "at least 6 problems that the other does not", probe_advice.LEAST_DISCORDANT, 6),
        ("distillation_guide", "McNemar's exact test has p < 0.05", probe_advice.LEVEL, 0.05),
        ("distillation_guide", "Below 50 % the training sees", verdicts.COVERED_SHARE, 0.5),
        ("operations", "a run of ten minutes forgives", supervise.STEADY_SECONDS, 600),
        ("architecture", "A prefix of at least 32 tokens", guest_kv.MIN_ALIASED_PREFIX, 32),
    ],
)
def test_numbers(name, sentence, constant, value):
    assert constant == value and sentence in words(page(f"docs/{name}.md"))


# -- the distillation guide ------------------------------------------------------------------------------------------


def settings(folder: Path, rows: list[dict], **sections) -> str:
    """A run's file over these problems."""
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "data": {"path": str(folder / "problems.jsonl")},
        "contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]},
        "output": {"dir": str(folder / "out")},
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "run.yaml")


@pytest.mark.parametrize(("length", "gives_it_away"), [(16, True), (15, False)])
def test_a_text_of_16_characters_is_no_chance(tmp_path, capsys, length, gives_it_away):
    """A shorter one is counted, and preview says so."""
    answer = "abcdefghijklmnop"[:length]
    run = settings(tmp_path, [{"problem": f"What of {answer}?", "answer": answer}, {"problem": "b?", "answer": "c"}])
    assert main(["preview", run]) == (2 if gives_it_away else 0)
    said = capsys.readouterr()
    if gives_it_away:
        assert "what the student reads gives away 'answer'" in said.err
    else:
        assert "prompt of 1 of 2 problems has a short value of 'answer' as a word in it" in words(said.out)


def test_what_the_student_really_read_is_looked_at_with_every_sample(tmp_path, capsys):
    """Here a template of the server's own gives the answer away. What was sampled before can be read all the same."""
    rows = [{"problem": f"{i} + 1?", "answer": f"it comes to {i + 1} in all"} for i in range(12)]
    run = settings(tmp_path, rows, client={"concurrency": 1})

    def behave(body):
        answer = stub_answer(body)
        problem = body["session_params"]["mixing"]["student_messages"][0]["content"]
        leak = "It comes to  8\nin all." if problem == "7 + 1?" else ""
        answer["meta_info"]["student_prompt_text"] = f"<|system|>{leak}<|user|>{problem}"
        return 200, answer

    with stub_server() as stub:
        stub.behave = behave
        assert main(["run", run, "--endpoint", stub.url, "--no-report"]) == 2
    assert "what the student reads gives away 'answer' ('it comes to 8 in all')" in capsys.readouterr().err
    assert len(datasets.load_dataset(str(tmp_path / "out"), split="train")) == 7


def test_the_surer_model_has_the_larger_say():
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.5]])
    alphas = [
        float(mix(teacher, student, torch.ones(1), AlphaParams.uniform(1, "entropy"), implementation="torch").alpha)
        for teacher, student in ((sure, unsure), (unsure, sure))
    ]
    assert alphas[0] > 0.9 and alphas[1] < 0.1
    assert "the model that is surer has the larger say" in page("docs/distillation_guide.md")


def test_six_prefix_strategies():
    import prefix_strategies

    assert len(prefix_strategies.STRATEGIES) == 6 and "compares six" in page("docs/distillation_guide.md")


@pytest.mark.parametrize(("said", "reason"), [("it is 3-5", None), ("it is 5", "wrong answer"), ("3", "wrong answer")])
def test_a_range_is_equal_to_itself_alone(said, reason):
    assert verdict({"type": "answer", "match": "numeric"}, record(said, "3-5")) == reason


def test_the_guide_s_own_filter():
    (code,) = re.findall(r"^```python my_filters.py\n(.*?)^```", page("docs/distillation_guide.md"), re.M | re.S)
    names: dict = {}
    exec(code, names)
    assert names["keep"](record("It is 7.")) is True
    assert names["keep"](record("I cannot say.")) == "says 'I cannot'"
    assert names["keep"](record("As an AI"), words=["As an AI"]) == "says 'As an AI'"


def test_columns_that_have_to_be_asked_for():
    section = page("docs/distillation_guide.md").split("### More of every token")[1].split("### Exports")[0]
    numbers = {"int32": pa.int32(), "float32": pa.float32()}
    said = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, _, kind = (cell.strip() for cell in line.strip("|").split(" | "))
            of = pa.list_(numbers[kind.split()[-1]])
            for name in re.findall(r"`(\w+)`", names):
                for side in SIDES:
                    said[name.replace("_X_", f"_{side}_")] = pa.list_(of) if "lists" in kind else of
    assert said == {name: schema([name]).field(name).type for name in OPTIONAL_COLUMNS}
    example = Output(**yaml.safe_load(section.split("```yaml")[1].split("```")[0])["output"])
    assert example.request_fields() == {
        "return_mixing_info": [*SERIES, "student_entropy", "behaviour_logprob"], "return_top_k": 32,
        "top_k_of": ["teacher", "mixture"],
    }  # fmt: skip


def test_the_shorter_name(monkeypatch, capsys):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sglang-optimal-distill")
    monkeypatch.setattr("sys.argv", ["sglang-optimal-distill", "schema"])
    with pytest.raises(SystemExit, match="^0$"):
        script.load()()
    assert json.loads(capsys.readouterr().out)["title"] == "sglang_optimal distillation run"


def test_records_in_the_journal_are_exported(tmp_path):
    store = RecordStore(tmp_path / "run")
    made = record("so 7")
    store.append(Record(**{**vars(made), "student_context": [{"role": "user", "content": "3 + 4?"}]}))
    store.write_json(store.manifest_path, {"state": "running"})
    assert [path.parent.name for path in find_shards(tmp_path / "run", "accepted")] == ["journal"]
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "x.jsonl"), "--format", "records"]) == 0
    assert json.loads((tmp_path / "x.jsonl").read_text())["text"] == "so 7"
    store.close()


def test_a_server_of_the_run_s_own_has_five_starts(tmp_path, monkeypatch):
    started = []

    async def start(own):
        started.append(own)
        own._process = ServerProcess("this", [], own.url, own._log)  # ends at once

    async def live():
        own = server.OwnServer({}, {}, tmp_path / "server.log")
        await own._start()
        await asyncio.wait_for(own._watch(), 30)

    monkeypatch.setattr(server.OwnServer, "_start", start)
    asyncio.run(live())
    assert len(started) == 5


def test_a_stopped_run_is_asked_again_for_what_was_in_flight_and_no_more(tmp_path, capsys):
    """Each sample is in the run once. The run says of short answers in the problems what preview says."""
    run = settings(tmp_path, [{"problem": f"{i} + 1?", "answer": "1"} for i in range(9)], client={"concurrency": 1})
    with stub_server() as stub:
        stub.behave = lambda body: (401, {}) if sum(stub.seen.values()) == 5 else ...
        assert main(["run", run, "--endpoint", stub.url, "--no-report"]) == 1
        assert "prompt of 9 of 9 problems has a short value of 'answer'" in words(capsys.readouterr().err)
        assert main(["run", run, "--endpoint", stub.url, "--no-report"]) == 0
        assert sorted(stub.seen.values()) == [1] * 8 + [2]
    assert len([row["id"] for row in read_rows(find_shards(tmp_path / "out", "accepted"))]) == 9


# -- operations ------------------------------------------------------------------------------------------------------


def test_the_router_s_command():
    from sglang_router.launch_router import parse_router_args

    (line,) = re.findall(r"^ *python -m sglang_router.launch_router (.+)$", page("docs/operations.md"), re.MULTILINE)
    args = parse_router_args(shlex.split(line))
    assert args.worker_urls == ["http://HOST:30001", "http://HOST:30002"] and args.policy == "cache_aware"


def ranks(monkeypatch, module, count: int) -> None:
    monkeypatch.setattr(module, "get_parallel", lambda: types.SimpleNamespace(tp_size=count))


def failed_rows():
    state = types.SimpleNamespace(failed=False)
    return state, types.SimpleNamespace(
        reqs=[
            types.SimpleNamespace(mixing=types.SimpleNamespace(guest=types.SimpleNamespace(kv=state, model="student")))
        ]
    )


def test_after_which_failures_of_the_student_s_forward_the_process_ends(monkeypatch):
    ranks(monkeypatch, failure, 1)
    state, rows = failed_rows()
    message = failure.guest_failure(torch.OutOfMemoryError("no room"), rows)
    assert message == "the student's forward failed: OutOfMemoryError: no room"
    assert state.failed  # what it has computed does not enter a radix cache
    with pytest.raises(torch.AcceleratorError):
        failure.guest_failure(torch.AcceleratorError("illegal access"), rows)
    ranks(monkeypatch, failure, 2)
    with pytest.raises(RuntimeError, match="bad luck"):
        failure.guest_failure(RuntimeError("bad luck"), rows)


def test_a_speculative_step_without_memory(monkeypatch, caplog):
    worker = object.__new__(speculative_worker.MixingSpecWorker)
    ranks(monkeypatch, speculative_worker, 1)
    worker._without_memory(torch.OutOfMemoryError("no room"), 12)
    assert "larger steps go on in lockstep" in caplog.text and worker._too_many == 12
    ranks(monkeypatch, speculative_worker, 2)
    with pytest.raises(torch.OutOfMemoryError):
        worker._without_memory(torch.OutOfMemoryError("no room"), 12)


class Pools:
    """A student's KV of 16 slots and 4 rows, as a worker makes it."""

    def __init__(self):
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        rows = ReqToTokenPool(4, 16, "cpu", False)
        self.allocator = TokenToKVPoolAllocator(16, torch.float32, "cpu", None, False)
        self.kv = guest_kv.SeparateGuestKV(rows, self.allocator, disable_radix_cache=False, eviction_policy="lru")


def test_a_slot_that_nobody_owns_ends_an_idle_scheduler():
    from sglang_optimal.runtime.managers.scheduler_components.invariant_checker import MixedSchedulerInvariantChecker

    pools = Pools()
    checker = object.__new__(MixedSchedulerInvariantChecker)
    checker.guest_kv = pools.kv
    checker.check_idle()
    lost = pools.allocator.alloc(1)
    with pytest.raises(ValueError, match="student pool memory leak detected! .*'free': 15"):
        checker.check_idle()
    pools.allocator.free(lost)
    checker.check_idle()


def test_sums_and_slots_of_a_busy_student():
    from sglang_optimal.runtime.managers.scheduler_components.invariant_checker import busy_report

    pools = Pools()
    assert busy_report(pools.kv, every_slot=True) is None
    lost = pools.allocator.alloc(2)
    assert "2 slots are missing while busy" in busy_report(pools.kv, every_slot=False)
    pools.allocator.free(lost[:1])
    pools.allocator.free(lost[:1])  # the sums are right again
    assert busy_report(pools.kv, every_slot=False) is None
    assert f"pages with more than one owner: {lost[:1].tolist()}" in busy_report(pools.kv, every_slot=True)


@pytest.mark.parametrize(("key", "allowed"), [("admin", True), ("user", False), (None, False)])
def test_the_admin_key_is_for_new_student_weights(key, allowed):
    from sglang.srt.utils.auth import decide_request_auth

    from sglang_optimal.runtime.entrypoints import http_server as routes

    decision = decide_request_auth(
        method="POST",
        path="/update_student_weights_from_disk",
        authorization_header=key and f"Bearer {key}",
        api_key="user",
        admin_api_key="admin",
        auth_level=routes.update_student_weights_from_disk._auth_level,
    )
    assert decision.allowed is allowed


# -- architecture ----------------------------------------------------------------------------------------------------

WHOLE = ("distill/filters", "distill/report", "demo", "page")
"""Folders that the page names as a whole."""


def test_every_module_is_named_in_its_room_and_is_there():
    section = page("docs/architecture.md").partition("## The packages")[2].partition("\n## ")[0]
    packages = dict(re.findall(r"^\*\*`(\w+)(?:/|\.py)`\*\*(.*?)(?=^\*\*`|\Z)", section, re.MULTILINE | re.DOTALL))
    packages["runtime"], _, tree = packages["runtime"].partition("```")
    named = {
        f"{package}/{name}" for package, text in packages.items() for name in re.findall(r"(?<!/)\b(\w+\.py)\b", text)
    }
    engine = {name.removeprefix("engine/") for name in named if name.startswith("engine/")} | {"engine.py"}
    named = {name for name in named if not name.startswith(("engine/", "tests/"))} | engine
    named |= {f"runtime/{name}" for name in re.findall(r"^(\S+\.py) ", tree, re.MULTILINE)}
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    whole = {name for name in modules if name.startswith(WHOLE)}
    assert named - {"runtime/engine.py", "runtime/launch_server.py"} == modules - whole


OTHERS = {"FlashInfer", "NumPy", "OpenAI", "PyTorch", "ScheduleBatch", "ValueError", "RoPE", "MoE", "NaN", "LoRA"}
"""Words of the page that look like a class of ours and are none."""


def test_every_class_is_there():
    defined = {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    words_alike = set(re.findall(r"\b[A-Z]+[a-z]+(?:[A-Z]\w*)+\b", page("docs/architecture.md")))
    assert len(words_alike & defined) > 15
    assert words_alike - defined <= OTHERS


def imports(folder: str) -> set[str]:
    """Modules that those of a folder, or a file, import, wherever in them."""
    path = PACKAGE / folder
    found: set[str] = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of(modules: set[str], *packages: str) -> set[str]:
    return {name for name in modules if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def test_mixing_knows_nothing_of_sglang():
    ours = of(imports("mixing"), "sglang_optimal")
    assert of(imports("mixing"), "sglang") == set() == ours - of(ours, "sglang_optimal.mixing")


def test_distill_knows_the_http_surface_alone():
    found = imports("distill")
    packages = [
        f"sglang_optimal.{name}" for name in ("runtime", "engine", "lang", "mixing", "platforms", "launch_server")
    ]
    assert of(found, "sglang", *packages) == set()


def test_who_touches_the_inside_of_sglang():
    allowed = {"runtime", "platforms", "lang", "engine.py", "launch_server.py"}
    assert {path.name for path in PACKAGE.iterdir() if of(imports(path.name), "sglang")} == allowed


@pytest.mark.parametrize(
    ("accelerator", "own_engine", "active"), [(False, "0", True), (True, "0", False), (False, "1", False)]
)
def test_the_platform_is_inactive_beside_an_accelerator(monkeypatch, accelerator, own_engine, active):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", own_engine)
    assert (activate() is not None) is active


# -- the checks on a GPU ---------------------------------------------------------------------------------------------


def test_stages_and_limits_of_the_checks(tmp_path):
    from bench.gpu import run_checks

    given = {"output": tmp_path, "scratch": tmp_path, "teacher": "T", "student": "S", "drafter": "D", "at_once": 1}
    checks = run_checks.checks(types.SimpleNamespace(**given))
    rows = re.findall(r"^\| (\w+) \| ([\w-]+) \| (\d+) \| \d+ \|", page("bench/gpu/README.md"), re.MULTILINE)
    assert rows == [(check.stage, name, str(check.limit)) for name, check in checks.items()]
