"""Escalation: step after step for the problems that are not solved, against counts that were worked out by hand."""

from __future__ import annotations

import json
import re
import time

import pytest
from made_runs import config_of, make_run, manifest_of, record, rows_of
from stub_server import stub_answer, stub_server
from test_run import PROBLEMS, Folder

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.compare import compare
from sglang_optimal.distill.escalation import step_rows
from sglang_optimal.distill.settings import fingerprint, is_same, step_configs
from sglang_optimal.distill.store import Tally

pytestmark = pytest.mark.usefixtures("impatient")

STEPS = [{"fixed_alpha": 0}, {"kl_budget": 0.1}, {"kl_budget": 0.5}, {"fixed_alpha": 1}]
ESCALATE = {"steps": STEPS}
SETTINGS = {"sampling": {"n": 2, "max_new_tokens": 16}, "mixing": {"alpha_max": 0.9}}


def level(body: dict) -> int:
    """At which of `STEPS` a request came."""
    if "session_params" not in body:
        return 0
    fields = body["session_params"]["mixing"]
    if fields.get("alpha_method") == "fixed" or "fixed_alpha" in fields:
        return 0 if fields["fixed_alpha"] == 0 else 3
    return {0.1: 1, 0.5: 2}[fields["kl_budget"]]


def number(body: dict) -> int:
    """Of the problem that a request is for."""
    if "input_ids" in body:
        return int(bytes(body["input_ids"]).decode().split()[0])
    return int(body["session_params"]["mixing"]["student_messages"][0]["content"].split()[0])


def behave(body: dict):
    """Step k solves problem i for k = i mod 4, but the last step none: a quarter stays unsolved. Both samples are
    right."""
    i, k = number(body), level(body)
    right = k == i % 4 and k < 3
    answer = stub_answer(body)
    answer["meta_info"]["finish_reason"] = {"type": "stop"}
    seed = body["sampling_params"]["sampling_seed"]
    return 200, answer | {"text": f"{seed}: the answer is {i % 3 if right else 7}."}


EXPECTED = [(1, 40, 80, 20, 10), (2, 30, 60, 20, 20), (3, 20, 40, 20, 30), (4, 10, 20, 0, 30)]
"""(step, problems, samples, accepted, covered by then)"""


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path)
    made.configure(escalate=ESCALATE, **SETTINGS)
    return made


@pytest.fixture
def solving():
    with stub_server() as server:
        server.behave = behave
        yield server


def expected_ids(n: int = 2) -> set[tuple[str, int, int]]:
    """(problem, sample, step)"""
    return {
        (f"p{i}", k, step)
        for i in range(PROBLEMS)
        for k in range(n)
        for step in range(1, 5)
        if step <= (i % 4) + 1 or i % 4 == 3
    }


def steps_of(folder) -> list[tuple[int, ...]]:
    tally = Tally()
    for row in rows_of(folder.out).values():
        tally.add(row)
    names = ("step", "problems", "samples", "accepted", "covered_by_then")
    return [tuple(row[name] for name in names) for row in step_rows(tally)]


def check_whole(folder) -> dict[str, dict]:
    rows = rows_of(folder.out)
    assert {(r["problem_id"], r["sample_index"], r["step"]) for r in rows.values()} == expected_ids()
    assert all(name == "{problem_id}/{strategy}/{sample_index}/{step}".format(**row) for name, row in rows.items())
    assert steps_of(folder) == EXPECTED
    return rows


def test_complete(folder, solving, capsys):
    assert folder.run(solving.url) == 0
    rows = check_whole(folder)
    assert set(solving.seen.values()) == {1} and len(solving.seen) == len(rows) == 200
    for row in rows.values():
        sampling, step = json.loads(row["sampling"]), STEPS[row["step"] - 1]
        assert sampling.items() >= step.items() and ("alpha_max" in sampling)
        assert (row["accepted"], row["step"] - 1) == (
            row["step"] - 1 == int(row["problem_id"][1:]) % 4 < 3,
            level_of(row),
        )
    said = capsys.readouterr()
    assert "200/at most 320 samples" in said.err and "step 1: both models run: http" in said.err
    assert "step 1: both models run: the student reads along" not in said.err
    assert "step 4: both models run: the student reads along" in said.err
    tokens = sum(row["num_tokens"] for row in rows.values() if row["step"] == 2)
    line = "20 of 60 samples accepted, 20 problems covered by then"
    assert f"step 2 (kl_budget 0.1): 30 problems, {line}, {2 * tokens:,} passes" in said.out
    manifest = manifest_of(folder.out)
    assert manifest["state"] == "complete" and manifest["planned"] == 320 and manifest["problems_covered"] == 30
    assert manifest["models_run"] == "both" and manifest["steps_run"] == ["both"] * 4
    card = (folder.out / "README.md").read_text()
    assert f"| 2: kl_budget 0.1 | 30 | 60 | 20 | 20 | {2 * tokens:,} |" in card and "| `step` |" in card
    assert main(["report", str(folder.out)]) == 0
    page = (folder.out / "report.html").read_text()
    table = re.sub(r"<[^>]*>", " ", page[page.index('id="steps"') : page.index('id="strategies-title"')])
    assert "differs between the steps" in page and "200 of 320 planned samples at most" in page
    assert "The steps have different settings of α." in page and "So far" not in page
    assert re.search(r"2: kl_budget 0\.1\s+30\s+60\s+20 \(33 %; 23–46 %\)\s+20\s+", table), table
    assert folder.run(solving.url) == 0 and len(solving.bodies) == 200  # nothing is left to do


def level_of(row: dict) -> int:
    sampling = json.loads(row["sampling"])
    return STEPS.index(next(step for step in STEPS if sampling.items() >= step.items()))


def test_preview(folder, capsys):
    argv = ["preview", str(folder.root / "run.yaml"), "--data", str(folder.root / "problems.jsonl"), "--problems", "1"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "40 problems, 4 steps, at most 320 samples" in said and re.search(r"p0/[ab]/0/1", said)


def test_the_student_alone_first(folder, solving, capsys):
    """On a server whose plain requests the student answers its step costs one pass a token."""
    solving.more_info = {"plain_requests_of": ["student"]}
    assert folder.run(solving.url) == 0
    rows = check_whole(folder)
    plain = [body for body in solving.bodies if "session_params" not in body]
    assert len(plain) == 80 and manifest_of(folder.out)["steps_run"] == ["student", "both", "both", "both"]
    assert manifest_of(folder.out)["models_run"] == "both"
    assert "step 1: the student alone runs, one forward pass a token" in capsys.readouterr().err
    first = [row for row in rows.values() if row["step"] == 1]
    assert {row["teacher_model"] for row in first} == {None} and {row["mean_alpha"] for row in first} == {0.0}
    assert {row["teacher_model"] for row in rows.values() if row["step"] > 1} == {"teacher"}
    tally = Tally()
    for row in rows.values():
        tally.add(row)
    assert tally.steps[1].passes == tally.steps[1].tokens == sum(row["num_tokens"] for row in first)
    assert tally.steps[2].passes == 2 * tally.steps[2].tokens


def test_it_goes_on_as_it_began(folder, solving, capsys):
    solving.more_info = {"plain_requests_of": ["student"]}
    assert folder.run(solving.url, more=("--limit", "5")) == 0
    with stub_server() as other:
        other.behave = behave
        assert folder.run(other.url) == 2
        assert "step 1: " in (said := capsys.readouterr().err) and "--teacher-model-path" in said
        assert not other.bodies


@pytest.mark.parametrize("one_model", ["never", "always"])
def test_one_model(folder, solving, one_model, capsys):
    """Of a mixture nothing is asked; where the servers cannot, ``always`` is refused."""
    folder.configure(escalate=ESCALATE, **SETTINGS | {"sampling": {"n": 2, "one_model": one_model}})
    if one_model == "never":
        solving.more_info = {"plain_requests_of": ["student", "teacher"]}
        assert folder.run(solving.url) == 0 and manifest_of(folder.out)["steps_run"] == ["both"] * 4
        assert all("session_params" in body for body in solving.bodies)
    else:
        assert folder.run(solving.url) == 2
        assert "step 1: " in (said := capsys.readouterr().err) and "always" in said
        solving.more_info = {"plain_requests_of": ["student", "teacher"]}
        assert folder.run(solving.url) == 0
        assert manifest_of(folder.out)["steps_run"] == ["student", "both", "both", "teacher"]


@pytest.mark.parametrize("requests", [40, 79, 80, 81, 111, 141, 190])
def test_resumed_wherever_it_stopped(folder, solving, requests):
    """The servers die within a step and at its end; the same command gives the run that was never stopped."""
    folder.configure(escalate=ESCALATE, client={"concurrency": 8, "max_downtime": 0.2}, **SETTINGS)
    with stub_server() as dying:
        dying.behave, dying.dies_after = behave, requests
        assert folder.run(dying.url) == 1
        assert manifest_of(folder.out)["state"] == "stopped"
        stored = rows_of(folder.out)
        assert 0 < len(stored) <= requests
    assert folder.run(solving.url) == 0
    assert check_whole(folder).items() >= stored.items()
    assert len(solving.bodies) == 200 - len(stored)


def test_killed_between_steps(folder, solving):
    kills = 0
    for wanted in (60, 100, 150):
        solving.delay = 0.03
        process = folder.process(solving.url)
        while process.poll() is None and len(solving.bodies) < wanted:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills == 3
    solving.delay = 0.0
    assert folder.run(solving.url) == 0
    check_whole(folder)


def test_shards(folder, solving):
    for i in (1, 0):
        assert folder.run(solving.url, more=("--shard", f"{i}/2")) == 0
    check_whole(folder)
    assert [manifest_of(folder.out, f"run-{i}-of-2.json")["planned"] for i in (0, 1)] == [160, 160]


def test_a_failed_request_keeps_its_problem_at_the_step(folder, solving, capsys):
    """Problem 2 would be solved at the third step; its second sample of the first cannot be had."""
    folder.configure(escalate=ESCALATE, client={"concurrency": 4, "retries": 1}, **SETTINGS)
    broken = {}

    def fails(body):
        if number(body) == 2 and level(body) == 0:
            seed = body["sampling_params"]["sampling_seed"]
            if broken.setdefault("seed", seed) == seed:
                return 500, {"error": "no"}
        return behave(body)

    solving.behave = fails
    assert folder.run(solving.url) == 1
    of_two = [row for row in folder.rows().values() if row["problem_id"] == "p2"]
    assert [row["step"] for row in of_two] == [1] and manifest_of(folder.out)["failed"] == 1
    solving.behave = behave
    assert folder.run(solving.url) == 0
    check_whole(folder)


def test_accept_and_n(folder, solving):
    """With two to accept nothing changes, as both samples of a step are right; with three the next step comes, in
    which none is; and n decides how many there are at each step."""
    folder.configure(escalate=ESCALATE | {"accept": 2}, **SETTINGS)
    assert folder.run(solving.url) == 0
    old = check_whole(folder)
    folder.configure(escalate=ESCALATE | {"accept": 3}, **SETTINGS)  # accept may change
    assert folder.run(solving.url) == 0
    rows = rows_of(folder.out)
    assert len(rows) == 4 * 2 * PROBLEMS and rows.items() >= old.items()
    folder.configure(escalate=ESCALATE | {"accept": 3}, **SETTINGS | {"sampling": {"n": 3, "max_new_tokens": 16}})
    assert folder.run(solving.url) == 0
    # Three right ones at the step that solves it. Those that two did not suffice for stay where they are, and more of
    # the later steps are not drawn.
    rows = rows_of(folder.out)
    assert sum(row["sample_index"] == 2 for row in rows.values()) == sum(count for _, count, *_ in EXPECTED)


def test_more_steps_behind(folder, solving, capsys):
    folder.configure(escalate={"steps": STEPS[:2]}, **SETTINGS)
    assert folder.run(solving.url) == 0
    old = rows_of(folder.out)
    assert len(old) == 140
    folder.configure(escalate=ESCALATE, **SETTINGS)
    assert folder.run(solving.url) == 0
    assert check_whole(folder).items() >= old.items()
    for steps in (STEPS[:2], [STEPS[0], {"kl_budget": 0.2}, *STEPS[2:]], STEPS[1:]):
        folder.configure(escalate={"steps": steps}, **SETTINGS)
        assert folder.run(solving.url) == 2
        assert "other settings (escalate)" in capsys.readouterr().err
    folder.configure(**SETTINGS)
    assert folder.run(solving.url) == 2


def test_every_strategy_with_cross(folder, solving):
    strategies = [{"name": "a", "teacher": "{answer}"}, {"name": "b", "teacher": "{answer}!"}]
    contexts = {"student": "{problem}", "strategies": strategies, "select": "cross"}
    folder.configure(escalate=ESCALATE, contexts=contexts, **SETTINGS)
    assert folder.run(solving.url, more=("--limit", "4")) == 0
    rows = rows_of(folder.out)
    assert len(rows) == 4 * (4 + 3 + 2 + 1) and {row["strategy"] for row in rows.values()} == {"a", "b"}
    assert manifest_of(folder.out)["planned"] == 4 * 4 * 4
    assert folder.run(solving.url, more=("--limit", "8")) == 0
    assert len(rows_of(folder.out)) == 80


def test_a_step_draws_its_own_strategies(folder, solving):
    """With select: sample; the first sample of a problem is not told the same at every step."""
    assert folder.run(solving.url) == 0
    told = {}
    for row in rows_of(folder.out).values():
        told.setdefault((row["problem_id"], row["sample_index"]), set()).add(row["strategy"])
    assert {"a", "b"} in told.values()


def test_worked_on(folder, solving, capsys):
    """filter, merge, compare and export know of steps; a merged run goes on."""
    for i in (0, 1):
        out = folder.root / f"shard-{i}"
        assert folder.run(solving.url, more=("--shard", f"{i}/2", "--out", str(out))) == 0
    folder.out = folder.root / "merged"
    argv = ["merge", str(folder.root / "shard-0"), str(folder.root / "shard-1"), "--out", str(folder.out)]
    assert main([*argv, "--no-report"]) == 0
    rows = check_whole(folder)
    count = len(solving.bodies)
    assert manifest_of(folder.out)["steps_run"] == ["both"] * 4 and manifest_of(folder.out)["planned"] == 320
    assert folder.run(solving.url) == 0 and len(solving.bodies) == count
    new = folder.root / "filters.yaml"
    new.write_text("filters: [{type: length, max_tokens: 4096}]")
    out = folder.root / "filtered"
    assert main(["filter", str(folder.out), "--config", str(new), "--out", str(out), "--no-report"]) == 0
    assert {name: row["step"] for name, row in rows_of(out).items()} == {
        name: row["step"] for name, row in rows.items()
    }
    capsys.readouterr()
    assert main(["compare", str(folder.out), str(out), "--output", str(folder.root / "c.json")]) == 0
    said = capsys.readouterr().out
    assert "merged, step 3 (kl_budget 0.5): 20 problems, 20 of 40 samples accepted, 30 problems covered by then" in said
    runs = json.loads((folder.root / "c.json").read_text())["runs"]
    assert [row["covered_by_then"] for row in runs[0]["steps"]] == [10, 20, 30, 30]
    assert [row["covered_by_then"] for row in runs[1]["steps"]] == [40] * 4
    train = folder.root / "train.jsonl"
    columns = ["--columns", "step", "--no-check"]
    assert main(["export", str(folder.out), "--output", str(train), "--format", "trl-sft", *columns]) == 0
    assert {json.loads(line)["step"] for line in train.read_text().splitlines()} == {1, 2, 3}


def test_the_order_of_samples(tmp_path):
    """A sample of an earlier step is before those of a later one, whatever its number."""

    def of(step, k, **more):
        return record("p", k, step=step, id=f"p/a/{k}/{step}", **more)

    a = make_run(tmp_path / "a", [of(2, 0, tokens=9), of(1, 1, tokens=1), of(1, 0, tokens=1, accepted=False)])
    b = make_run(tmp_path / "b", [record("p", 0, tokens=2)])
    result = compare([a, b])
    part = result["levels"]["tokens"]["runs"]["a"]
    assert (part["samples"], part["accepted"], part["tokens"]) == (2, 1, 2)
    assert [row["alpha"] for row in result["runs"][0]["steps"]] == ["–", "–"] and "steps" not in result["runs"][1]


def test_runs_of_older_versions(tmp_path):
    """Without the column; they are none that escalated."""
    folder = make_run(tmp_path / "a", [record("p"), record("q", accepted=False)], config_of(output={"format": "jsonl"}))
    for path in folder.glob("*/*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "step"}) + "\n" for row in rows))
    other = make_run(tmp_path / "b", [record("r")])
    assert main(["merge", str(folder), str(other), "--out", str(tmp_path / "c")]) == 0
    rows = rows_of(tmp_path / "c")
    assert len(rows) == 3 and {row["step"] for row in rows.values()} == {None}
    assert "## Steps" not in (tmp_path / "c" / "README.md").read_text()
    assert 'id="steps"' not in (tmp_path / "c" / "report.html").read_text()


def test_a_plain_run_is_what_it_was():
    assert fingerprint(config_of()) == "28f8aaef84cd21da"
    assert fingerprint(config_of(mixing={"kl_budget": 0.1}, sampling={"n": 3})) == "5cd60fa36523f4db"
    old = config_of().model_dump(mode="json")
    del old["escalate"]
    assert is_same({"config": old, "fingerprint": "older"}, config_of())
    assert not is_same({"config": old}, config_of(escalate=ESCALATE))


def test_settings_of_a_step():
    """Over those of the section mixing; a number drops the method and number of that."""
    config = config_of(mixing={"kl_budget": 0.3, "alpha_max": 0.5}, escalate={"steps": [*STEPS, {"alpha_min": 0.1}]})
    fields = [step.mixing.request_fields() for step in step_configs(config)]
    assert fields[0] == {"alpha_method": "fixed", "fixed_alpha": 0.0, "alpha_max": 0.5}
    assert fields[1] == {"alpha_method": "kl_budget", "kl_budget": 0.1, "alpha_max": 0.5}
    assert fields[4] == {"alpha_method": "kl_budget", "kl_budget": 0.3, "alpha_max": 0.5, "alpha_min": 0.1}
    assert step_configs(config_of()) == [config_of()]


@pytest.mark.parametrize(
    ("escalate", "mixing", "message"),
    [
        ({"steps": STEPS[:1]}, {}, "escalate.steps: List should have at least 2 items"),
        ({"steps": [{}, {"fixed_alpha": 1}]}, {}, "escalate.steps[0]: a step needs one of alpha_method, alpha_min"),
        ({"steps": [{"kl_budgt": 1}, *STEPS]}, {}, "escalate.steps[0]: unknown key 'kl_budgt'. Did you mean 'kl_bu"),
        ({"steps": [{"temperature": 1}, *STEPS]}, {}, "escalate.steps[0]: unknown key 'temperature'. It belongs to"),
        ({"steps": [{"kl_budget": -1}, *STEPS]}, {}, "escalate.steps[0].kl_budget: must be a finite number, 0 or"),
        ({"steps": [{"alpha_method": "kl_budget"}, *STEPS]}, {}, "escalate.steps[0]: kl_budget: required when"),
        ({"steps": STEPS, "accept": 0}, {}, "escalate.accept: Input should be greater than 0"),
        ({"steps": STEPS, "n": 2}, {}, "escalate: unknown key 'n'. It belongs to `sampling`."),
        ({"step": STEPS}, {}, "2 errors"),
        (
            {"steps": [{"alpha_max": 0.2}, *STEPS]}, {"alpha_min": 0.5},
            "escalate.steps[0]: with the section mixing: alpha_min: 0.5 is greater than alpha_max 0.2",
        ),
        (
            {"steps": [{"alpha_max": 0.2}, *STEPS]}, {"fixed_alpha": 0.5},
            "escalate.steps[0]: with the section mixing: alpha_max: is not read by alpha_method 'fixed'",
        ),
    ],
)  # fmt: skip
def test_wrong_settings(escalate, mixing, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(escalate=escalate, mixing=mixing)
