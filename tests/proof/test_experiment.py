"""The whole matrix on a stub of a server and a tiny model: killed, gone on with, cut to a budget."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import types

import pytest
import torch
from rich.console import Console
from stub_server import stub_answer, stub_server
from tiny_models import build_tiny_tokenizer_model

from bench.proof import __main__ as command
from bench.proof import experiment as module
from bench.proof import rounds, training
from bench.proof.experiment import Experiment
from bench.proof.lines import Results, key_of
from bench.proof.plan import PARTS, Cell, Part, cells, data_arms, estimate, needs, to_run
from bench.proof.policies import POLICIES
from bench.proof.scales import SCALES, Scale
from bench.proof.sources import pool
from bench.proof.tasks import TASKS
from sglang_optimal.names import CARRIER

SCALE = Scale("smoke", 8, 6, (0,), 1, 4, 2, 4, 1, 4, 1, 8, 4096, 6)
FEW = (
    Part("one-step", (("mix", "passes"), ("rs", "passes"), ("mix-sound", "tokens"), ("reference", "tokens")), ""),
    Part("rule", (("mix", "tokens"),), ""),
    Part("skilled", (("mix-kl", "rounds"), ("mix-sft", "rounds"), ("own-kl", "rounds")), ""),
)
PROBLEMS = {p.problem: p for task in ("one-step", "skilled") for p in TASKS[task].training(8, 0)}


def behave(body: dict):
    """Of three seeds one writes the solution, one leaps to the answer, and one is wrong."""
    status, answer = 200, stub_answer(body)
    custom = body.get("session_params", {}).get(CARRIER)
    if custom is None:
        said = bytes(body["input_ids"]).decode()
    else:
        said = custom["student_messages"][-1]["content"]
        answer["meta_info"] |= {"student_prompt_ids": list(said.encode()), "teacher_prompt_ids": [1]}
    problem = PROBLEMS[said.removeprefix("Answer this question: ")]
    seed = body["sampling_params"]["sampling_seed"]
    texts = (problem.solution, f"({seed}) The answer is {problem.answer}.", f"No idea ({seed}), is it 5000?")
    answer["text"] = texts[seed % 3]
    answer["meta_info"]["finish_reason"] = {"type": "stop"}
    return status, answer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_tokenizer_model(
        tmp_path_factory.mktemp("proof") / "model", seed=1, hidden_size=32, num_layers=1, vocab_size=256
    )


@pytest.fixture
def made(tmp_path, model, monkeypatch):
    """An experiment that can be made again on the same folder; updates: of the student, counts: of what was done."""
    few = {"sources": ("student", "mixture", "teacher"), "max_new_tokens": 8}
    monkeypatch.setitem(TASKS, "one-step", dataclasses.replace(TASKS["one-step"], **few))
    for name in ("rule", "skilled"):
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], max_new_tokens=8))
    with stub_server() as server:
        server.more_info = {"plain_requests_of": ["teacher", "student"]}
        server.behave = behave
        asked: list[str] = []
        updates: list[str] = []
        monkeypatch.setattr(module, "update_student", lambda url, path, version: updates.append(version))

        def url(kind: str) -> str:
            asked.append(kind)
            return server.url

        def make(scale: Scale = SCALE) -> Experiment:
            results = Results(tmp_path / "lines.jsonl", scale, "tiny")
            engines = types.SimpleNamespace(url=url)
            return Experiment(results, tmp_path / "out", str(model), engines, Console(file=io.StringIO()))

        (tmp_path / "out").mkdir()
        yield types.SimpleNamespace(make=make, server=server, asked=asked, updates=updates)


def test_everything_is_run_once_and_gone_on_with(made, model, monkeypatch):
    plan = cells(SCALE, FEW)
    trainings = 0
    really = training.trained

    def counted(*args, **kwargs):
        nonlocal trainings
        trainings += 1
        return really(*args, **kwargs)

    monkeypatch.setattr(module, "trained", counted)
    # Killed after every cell, and once in the middle of one, when its samples are there.
    lasts: list[tuple] = []
    for _ in range(4):
        first = made.make()
        todo = [cell for cell in plan if not first.results.has(cell.key)]
        assert first.run(todo[:5]) == []
        lasts.append(key_of(first.results.lines[-1]))
    assert lasts == [cell.key for cell in plan[4:20:5]]

    def killed(self, line):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Results, "append", killed)
        made.make().run(plan)
    sampled = sum(made.server.seen.values())
    done = made.make()
    assert done.run(plan) == [] and made.make().run(plan) == []
    lines = done.results.lines
    assert [key_of(line) for line in lines] == [cell.key for cell in plan]
    assert sampled <= sum(made.server.seen.values())
    # 5 + 2 + 2 samples of 8 problems, 2 + 2 of the rule's 8; rounds of 2 · 4, two arms share the first one's mixture.
    assert sum(made.server.seen.values()) == 8 * (5 + 2 + 2) + 8 * (2 + 2) + 8 * (2 + 3)
    assert set(made.asked) == {"shared", "skilled"}
    again = lines[20].get("steps", 0) > 0  # the cell that was killed
    assert trainings == sum(line.get("steps", 0) > 0 for line in lines) + again
    assert (model / "config.json").exists(), "the model itself is no checkpoint of ours"

    base = next(line for line in lines if line["kind"] == "untrained")
    assert len(base["solved_problems"]) == len(base["followed_problems"]) == 6
    by = {(line["kind"], line["task"], line["arm"], line["level"], line["round"]): line for line in lines}
    student = by["sample", "one-step", "student", "all", 0]
    assert student["samples"] == 40 and student["passes"] == student["tokens"]
    rs, mix = by["data", "one-step", "rs", "passes", 0], by["data", "one-step", "mix", "passes", 0]
    assert mix["samples"] == 16 and mix["passes"] == 2 * mix["tokens"] and rs["passes"] <= mix["passes"]
    assert mix["accepted"] > mix["sound"] > 0, "leaps are accepted, and not sound"
    sound = by["data", "one-step", "mix-sound", "passes", 0]
    assert sound["accepted"] == sound["sound"] == mix["sound"] and sound["passes"] == mix["passes"]
    equal = by["train", "one-step", "mix-sound", "tokens", 0]
    fewest = min(by["data", "one-step", arm, "passes", 0]["accepted_tokens"]
                 for arm in ("rs", "mix", "mix-sound", "star", "teacher"))  # fmt: skip
    assert 0 < equal["trained_tokens"] <= fewest
    assert by["train", "one-step", "mix", "passes", 0]["trained_tokens"] == mix["accepted_tokens"]
    assert by["train", "one-step", "reference", "tokens", 0]["trained_tokens"] <= fewest
    assert by["sample", "rule", "mixture", "all", 0]["sound"] is None
    kl, sft = by["rounds", "skilled", "mix-kl", "all", 1], by["rounds", "skilled", "mix-sft", "all", 1]
    assert kl["samples"] == sft["samples"] == 8 and kl["trained_samples"] == 8
    assert sft["trained_samples"] == sft["accepted"] < 8
    assert all(line["seconds"] >= 0 and line["cpu"] and line["versions"] for line in lines)


def test_rounds_update_the_student_that_samples(made):
    plan = cells(SCALE, FEW[2:])
    run = made.make()
    run.run(plan)
    assert made.updates == [f"seed-0-{arm}-{before}" for arm in ("mix-kl", "mix-sft", "own-kl") for before in (0, 1)]
    asked = [body["session_params"][CARRIER] for body in made.server.bodies]
    assert {custom.get("kl_budget", custom.get("fixed_alpha")) for custom in asked} == {0.5, 0.2, 0.0}
    assert all(custom["teacher_messages"] == custom["student_messages"] for custom in asked), "no privilege"
    # Of the checkpoints only the last of each arm is kept.
    kept = sorted(path.parent.name for path in run.out.glob("skilled/seed-0/*/student-*"))
    assert kept == ["mix-kl", "mix-sft", "own-kl"]
    assert all(path.name == "student-2" for path in run.out.glob("skilled/seed-0/*/student-*"))


def test_a_checkpoint_that_is_gone_is_said(made, tmp_path):
    plan = cells(SCALE, FEW[2:])
    place = next(i for i, cell in enumerate(plan) if cell.round == 2)
    run = made.make()
    run.run(plan[:place])
    rounds.forget(tmp_path / "out" / "skilled")
    with pytest.raises(ValueError, match="--out: .*student-1 is not there"):
        made.make().run(plan)


def test_nothing_accepted_leaves_the_student_as_it_was(made):
    made.server.behave = lambda body: (200, {**behave(body)[1], "text": "I do not know, perhaps 5000"})
    run = made.make()
    run.run(cells(SCALE, (Part("one-step", (("mix", "passes"),), ""),)))
    before, after = run.results.find(kind="untrained"), run.results.find(kind="train")
    assert (after["trained_samples"], after["steps"], after["accepted"]) == (0, 0, 0)
    assert after["solved_problems"] == before["solved_problems"]


def test_a_budget_ends_in_order_of_worth(made):
    plan = cells(SCALE, FEW)
    run = made.make()
    assert run.run(plan, budget=1e-3) == plan and not run.results.lines and not made.asked
    some = sum(estimate(cell, SCALE) for cell in plan[:3])
    left = run.run(plan, budget=some)
    assert left and left == plan[len(run.results.lines) :] and len(run.results.lines) >= 1


def test_samples_are_judged_by_each_filter(made, tmp_path):
    run = made.make()
    run.run([Cell("sample", "one-step", "mixture")])
    samples = [each for one in pool(TASKS["one-step"], 0, "mixture", tmp_path / "out").values() for each in one]
    assert len(samples) == 16 and all(each.prompt_ids and each.token_ids for each in samples)
    for each in samples:
        assert each.accepted["plain"] or not each.accepted["sound"]
        assert not (each.accepted["nospike"] and each.surprising)
    assert sum(each.accepted["plain"] for each in samples) > sum(each.accepted["sound"] for each in samples) > 0


def test_training_learns_what_it_is_given(model, tmp_path):
    """Plain SFT on solutions, long enough, makes the tiny student likelier to write them; the steps are the scale's."""
    scale = dataclasses.replace(SCALE, learning_rate=1e-2)
    tiny, tokenizer = training.load(model, scale)
    rows = training.solution_rows(tokenizer, TASKS["one-step"].training(8, 0))
    assert rows[0]["completion_ids"][-1] == tokenizer.eos_token_id
    losses = [
        training.trained(training.load(model, scale)[0], rows, scale, tmp_path, steps=steps, seed=0)[1]
        for steps in (1, 30)
    ]
    assert [each["steps"] for each in losses] == [1, 30]
    assert losses[1]["train_loss"] < losses[0]["train_loss"] - 0.5
    with pytest.raises(ValueError, match="nothing to train on"):
        training.trained(tiny, [], scale, tmp_path, steps=1, seed=0)


def test_answers_do_not_depend_on_what_stands_beside_them(model):
    """Prompts of other lengths are padded at the left."""
    tiny, tokenizer = training.load(model, SCALE)
    problems = TASKS["one-step"].held_out(5)
    assert len({len(training.prompt_ids(tokenizer, problem)) for problem in problems}) > 1
    together = training.answers(tiny, tokenizer, problems, SCALE, 12)
    alone = [training.answers(tiny, tokenizer, [problem], SCALE, 12)[0] for problem in problems]
    assert together == alone and any(together)
    whole = []
    for problem in problems:  # and not on the two parts in which long ones are written
        ids = torch.tensor([training.prompt_ids(tokenizer, problem)])
        written = tiny.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.eos_token_id)
        whole.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert together == whole


def test_the_matrix():
    scale = SCALES["cpu"]
    plan = cells(scale)
    assert len(set(plan)) == len(plan)
    seen: set[Cell] = set()
    for cell in plan:
        assert set(needs(cell)) <= seen, f"{cell} comes before what it needs"
        seen.add(cell)
    for task in ("one-step", "two-step", "rule"):
        data = {cell.arm for cell in plan if cell.kind == "data" and cell.task == task}
        assert data == set(data_arms(task)), "in the end all of what was sampled is counted"
    trained = {cell.arm for cell in plan if cell.kind == "train" and cell.task == "one-step"}
    assert set(POLICIES) | {"reference"} <= trained
    assert {
        f"{arm}-{variant}" for arm in ("rs", "star", "mix", "escalation") for variant in ("sound", "nospike")
    } <= trained
    assert {cell.arm for cell in plan if cell.kind == "rounds"} == set(rounds.ROUND_ARMS)
    assert all(estimate(cell, scale) > 0 for cell in plan)
    measured = [{"kind": "train", "task": "one-step", "seconds": 7.0, "arm": "mix"}]
    assert estimate(Cell("train", "one-step", "rs", "passes"), scale, measured) == 7.0
    assert estimate(Cell("train", "two-step", "mix", "passes"), scale, measured) != 7.0
    assert [part.task for part in PARTS[:3]] == ["one-step", "two-step", "skilled"]


def test_the_skilled_teacher_learns_other_problems():
    task, scale = TASKS["skilled"], SCALES["cpu"]
    taught = {p.problem for p in rounds.teacher_problems(task, scale)}
    assert len(taught) == scale.teacher_problems
    for seed in scale.seeds:
        own = [rounds.problems_of(task, scale, seed, round) for round in range(1, scale.rounds + 1)]
        flat = [p.problem for each in own for p in each]
        assert len(flat) == len(set(flat)) == scale.rounds * scale.round_problems and not taught & set(flat)
    assert not taught & {p.problem for p in task.held_out(scale.held_out)}


def test_samples_of_another_machine_are_drawn_again_where_they_are_needed(made, tmp_path):
    plan = cells(SCALE, FEW[:1])
    first = made.make()
    assert first.run(plan) == []
    path = first.results.path
    left = [
        line
        for line in path.read_text().splitlines(keepends=True)
        if '"kind": "train", "task": "one-step", "arm": "rs"' not in line
    ]
    path.write_text("".join(left))
    shutil.rmtree(tmp_path / "out" / "one-step")
    asked = sum(made.server.seen.values())
    again = made.make()
    # The student's samples, and the mixture's, which say how many passes there are; not the teacher's.
    assert [(cell.kind, cell.arm) for cell in to_run(plan, again.results, again.out)] == [
        ("sample", "mixture"), ("sample", "student"), ("train", "rs"),
    ]  # fmt: skip
    assert again.run(plan) == []
    assert to_run(plan, again.results, again.out) == []
    assert sorted(key_of(line) for line in again.results.lines) == sorted(cell.key for cell in plan)
    assert len(again.results.lines) == len(left) + 1
    assert sum(made.server.seen.values()) - asked == 8 * (5 + 2)


def test_the_command(tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    assert command.main(["--plan", "--results", str(lines)]) == 0
    said = capsys.readouterr().out
    assert f"to run: {len(cells(SCALES['cpu']))} results" in said and "min  rounds skilled mix-kl" in said
    assert not lines.exists()
    with pytest.raises(SystemExit) as stopped:
        command.main(["--budget", "0"])
    assert stopped.value.code == 2 and "--budget: must be positive" in capsys.readouterr().err
    assert command.main(["--model-path", str(tmp_path), "--results", str(lines)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    lines.write_text("no json\n")
    assert command.main(["--plan", "--results", str(lines)]) == 2
    assert "line 1: is no result" in capsys.readouterr().err


def test_a_budget_that_is_spent_starts_no_server(tmp_path, model, capsys):
    lines = tmp_path / "lines.jsonl"
    flags = ["--model-path", str(model), "--results", str(lines), "--out", str(tmp_path / "out"), "--budget", "0.001"]
    assert command.main(flags) == 0
    said = capsys.readouterr().out
    assert f"not run for want of time; the same command goes on: {len(cells(SCALES['cpu']))} results" in said
    assert not lines.exists() and not list((tmp_path / "out").iterdir())
    for other in (tmp_path / "out", tmp_path):
        with command._alone(other):
            assert command.main(flags) == 2
            assert f"{other}: another run is writing here" in capsys.readouterr().err
    assert command.main(flags) == 0
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["out"]'
