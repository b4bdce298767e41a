"""`distill probe`: the settings, their runs, what came of them, and the rules of the recommendation one by one."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path

import pytest
from made_runs import config_of, contents, make_run, manifest_of, record, rows_of
from stub_server import stub_answer, stub_server
from test_escalation import number
from test_run import Folder

from sglang_optimal.distill import probe as probing
from sglang_optimal.distill.cli import main
from sglang_optimal.distill.passes import ALONE
from sglang_optimal.distill.probe import Arm, arms_of, assessed
from sglang_optimal.distill.probe_settings import DEFAULT, settings_of
from sglang_optimal.distill.probe_table import draw

pytestmark = pytest.mark.usefixtures("impatient")

# -- settings --------------------------------------------------------------------------------------------------------


def test_settings():
    assert settings_of("student,kl_budget=0.1, fixed_alpha=0.5,kl_symmetry+alpha_max=0.3,alpha_max=3e-1,teacher") == {
        "student": {"fixed_alpha": 0.0},
        "kl_budget=0.1": {"kl_budget": 0.1},
        "fixed_alpha=0.5": {"fixed_alpha": 0.5},
        "kl_symmetry+alpha_max=0.3": {"alpha_method": "kl_symmetry", "alpha_max": 0.3},
        "alpha_max=3e-1": {"alpha_max": 0.3},
        "teacher": {"fixed_alpha": 1.0},
    }
    assert (
        list(settings_of("+kl_budget=1")) == [*settings_of(DEFAULT), "kl_budget=1"] and len(settings_of(DEFAULT)) == 8
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studnt,teacher", "there is no setting 'studnt'"),
        ("student,,teacher", "there is no setting ''"),
        ("kl_budget,teacher", "'kl_budget': kl_budget needs a number, such as kl_budget=0.1"),
        ("fixed,teacher", "'fixed': fixed_alpha: required when"),
        ("kl_budget=x,teacher", "'kl_budget=x': 'x' is no number"),
        ("temperature=1,teacher", "'temperature=1': 'temperature' is none of alpha_method"),
        ("teacher,teacher", "'teacher' is there twice"),
        ("teacher,fixed_alpha=1", "'fixed_alpha=1' is there twice"),
        ("kl_budget=0.1+kl_budget=0.2,teacher", "gives kl_budget twice"),
        ("kl_budget=-1,teacher", "'kl_budget=-1': kl_budget: must be a finite number, 0 or more"),
        ("kl_budget=nan,teacher", "'kl_budget=nan': "),
        ("kl_budget=0.1+fixed_alpha=0.2,teacher", "give only one of them"),
        ("fixed_alpha=0.2+alpha_max=0.3,teacher", "alpha_max: is not read by alpha_method 'fixed'"),
        ("alpha_min=0.9+alpha_max=0.3,teacher", "alpha_min: 0.9 is greater than alpha_max 0.3"),
        ("teacher", "'teacher' is one setting; give two or more"),
    ],
)
def test_wrong_settings_start_nothing(tmp_path, capsys, text, message):
    folder = Folder(tmp_path)
    assert folder_probe(folder, "http://127.0.0.1:9", f"--settings={text}") == 2
    assert message in capsys.readouterr().err and not folder.out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--problems", "0"), "--problems: must be positive"), (("--n", "0"), "sampling.n"),
        (("--seed=-1",), "--seed: must not be negative"),
        (("--strategies",), "strategies[1].teacher: the data has no field"),
        (("--data", "/none.jsonl"), "no such file"),
    ],
)  # fmt: skip
def test_wrong_flags(tmp_path, capsys, more, message):
    folder = Folder(tmp_path)
    if more == ("--strategies",):
        folder.configure(contexts=strategies("a", "b") | {"strategies": [{"teacher": "a"}, A_TYPO]})
    assert folder_probe(folder, "http://127.0.0.1:9", *more) == 2
    assert message in capsys.readouterr().err and not folder.out.exists()
    made = make_run(tmp_path / "run", [record()])
    before = contents(made)
    assert folder_probe(folder, "http://127.0.0.1:9", "--out", str(made)) == 2
    assert "is a run; give a folder for the runs" in capsys.readouterr().err and contents(made) == before


A_TYPO = {"name": "b", "teacher": "{answre}"}


def strategies(*names, **more):
    return {
        "student": "{problem}",
        "strategies": [{"name": name, "teacher": f"{name} {{problem}} {{answer}}"} for name in names],
        **more,
    }


def test_strategies_one_by_one(tmp_path):
    """The student alone reads the same whatever the teacher is told, and is there once."""
    data = tmp_path / "p.jsonl"
    data.write_text('{"problem": "a?", "answer": "1"}\n')
    server = {"client": {"endpoints": ["http://x:1"]}, "data": {"path": str(data)}}
    config = config_of(contexts=strategies("a", "b"), **server)
    names = [arm.name for arm in arms_of(config, tmp_path / "o", settings="student,kl_budget=0.1")]
    assert names == ["student", "kl_budget=0.1"]
    arms = arms_of(config, tmp_path / "o", settings="student,kl_budget=0.1", strategies=True)
    assert [arm.name for arm in arms] == ["student", "kl_budget=0.1@a", "kl_budget=0.1@b"]
    assert [s.name for s in arms[2].config.contexts.strategies] == ["b"]
    crossed = config_of(contexts=strategies("a", "b", select="cross"), **server)
    assert [arm.name for arm in arms_of(crossed, tmp_path / "o", settings="student,kl_budget=0.1")] == [
        arm.name for arm in arms
    ]
    own = strategies("a", "b")
    own["strategies"][1]["student"] = "{problem}!"
    arms = arms_of(config_of(contexts=own, **server), tmp_path / "o", settings="student,teacher", strategies=True)
    assert [arm.name for arm in arms] == ["student@a", "student@b", "teacher@a", "teacher@b"]
    assert [arm.kind for arm in arms] == ["student"] * 2 + ["teacher"] * 2


def test_a_setting_is_over_the_file_s(tmp_path):
    data = tmp_path / "p.jsonl"
    data.write_text('{"problem": "a?", "answer": "1"}\n')
    filters = [{"type": "kl", "max_mean_to_teacher": 9}]
    config = config_of(
        data={"path": str(data), "limit": 7}, mixing={"kl_budget": 0.3, "alpha_max": 0.5}, filters=filters,
        client={"endpoints": ["http://x:1"]}, sampling={"one_model": "auto"},
    )  # fmt: skip
    arms = arms_of(config, tmp_path / "o", settings="student,alpha_max=0.2,kl_symmetry")
    fields = [arm.config.mixing.request_fields() for arm in arms]
    assert fields[1] == {"alpha_method": "kl_budget", "kl_budget": 0.3, "alpha_max": 0.2}
    assert fields[2] == {"alpha_method": "kl_symmetry", "alpha_max": 0.5}
    # The filter needs the teacher's log-probabilities, so that the student does not run alone.
    assert [arm.config.sampling.one_model for arm in arms] == ["never", "auto", "auto"]
    assert {arm.config.data.limit for arm in arms} == {7}


# -- the rules -------------------------------------------------------------------------------------------------------

PROBLEMS = 40
MIX = "kl_budget=0.1"


def probe_of(folder: Path, covered: dict[str, set[int]], *, tokens: dict[str, int] | None = None, problems=PROBLEMS):
    """A probe of one sample a problem, each of 10 tokens (or so many); covered: the problems that each setting has a
    right sample of."""
    arms = []
    for name, right in covered.items():
        sampling = {ALONE: name} if name in ("student", "teacher") else {}
        size = (tokens or {}).get(name, 10)
        records = [
            record(f"p{i:02}", tokens=size, accepted=i in right, sampling=sampling) for i in range(problems)
        ]  # fmt: skip
        config = config_of(output={"dir": str(folder / name)})
        make_run(folder / name, records, config)
        arms.append(Arm(name, name if name in ("student", "teacher") else "mixture", config))
    return assessed(arms)


def advice(folder, covered, **more):
    return probe_of(folder, covered, **more)["recommendation"]


def test_the_cheapest_that_is_not_told_apart_from_the_best(tmp_path):
    """400·2/24 = 33 passes an accepted sample at 0.1; 600·2/25 = 48 at 0.9, whose samples are longer. The student has
    5, so that 19 are the mixture's alone: p = 2⁻¹⁸."""
    found = probe_of(
        tmp_path, {"student": set(range(5)), MIX: set(range(24)), "fixed_alpha=0.9": set(range(25))},
        tokens={"fixed_alpha=0.9": 15},
    )  # fmt: skip
    said = found["recommendation"]
    assert (said["verdict"], said["name"], said["title"]) == ("setting", MIX, f"Take {MIX}")
    assert f"{MIX} covers 24 of 40 problems at 33 passes an accepted sample" in said["reason"]
    assert (
        "cheapest of 2 that are not told apart from fixed_alpha=0.9, which covers most (25; +2.5 points"
        in said["reason"]
    )
    assert "The student alone covers 5 (+47.5 points, " in said["reason"]
    costs = [arm["passes_per_accepted"] for arm in found["arms"]]
    assert costs == [400 / 5, 800 / 24, 1200 / 25]


def test_the_best_where_it_is_told_apart(tmp_path):
    said = advice(tmp_path, {"student": set(range(5)), MIX: set(range(15)), "fixed_alpha=0.9": set(range(30))})
    assert said["name"] == "fixed_alpha=0.9" and "more than any other setting" in said["reason"]


def test_the_teacher_may_be_the_cheapest_and_a_mixture_is_named(tmp_path):
    said = advice(tmp_path, {"student": set(range(5)), MIX: set(range(30)), "teacher": set(range(30))})
    assert (said["verdict"], said["name"]) == ("setting", "teacher")
    assert f"{MIX} is the cheapest mixture that is not told apart ({MIX} covers 30 of 40" in said["reason"]


def test_rejection_sampling_is_enough(tmp_path):
    """The mixture covers as many, another far fewer."""
    said = advice(tmp_path, {"student": set(range(30)), MIX: set(range(30)), "teacher": set(range(10))})
    assert (said["verdict"], said["name"]) == ("student", "student") and "Rejection sampling" in said["title"]
    assert "student covers 30 of 40 problems" in said["reason"]


@pytest.mark.parametrize(("problems", "verdict"), [(36, "student"), (34, "unknown")])
def test_all_cover_all(tmp_path, problems, verdict):
    """None of n problems beyond the student's: the exact interval ends at 1 − 0.025^(1/n), which is 0.0974 of 36 and
    0.1028 of 34, beyond a tenth."""
    everything = set(range(problems))
    said = advice(tmp_path, {"student": everything, MIX: everything}, problems=problems)
    assert said["verdict"] == verdict
    assert ("10% of the problems beyond" in said["reason"]) == (verdict == "student")


def test_the_teacher_s_text_is_better(tmp_path):
    """Nothing that a mixture covers is told apart from the student's two; the teacher's 30 are."""
    said = advice(tmp_path, {"student": {0, 1}, MIX: {0, 1, 2, 3, 4, 5}, "teacher": set(range(30))})
    assert (said["verdict"], said["name"]) == ("teacher", "teacher") and "teacher's text is better" in said["title"]
    assert "teacher covers 30 of 40 problems, the student alone 2 (+70.0 points" in said["reason"]


@pytest.mark.parametrize(("alone", "verdict"), [(5, "unknown"), (6, "setting")])
def test_six_problems_tell_two_settings_apart(tmp_path, alone, verdict):
    """2 · 2⁻⁵ = 0.0625 is not below 0.05, though the bootstrap's interval is above 0; 2 · 2⁻⁶ = 0.031 is."""
    found = probe_of(tmp_path, {"student": {0}, MIX: set(range(alone + 1))})
    (difference,) = found["comparison"]["levels"]["all"]["differences"]
    assert difference["covered_share"]["low"] > 0 and difference["covered_by_one_alone"] == [alone, 0]
    said = found["recommendation"]
    assert said["verdict"] == verdict
    if verdict == "unknown":
        assert said["name"] is None and "on 40 problems" in said["reason"] and "at least 6 problems" in said["reason"]


def test_too_few_though_others_are_told_apart(tmp_path):
    """The mixture covers five more than the student: it may be better. That the teacher is worse says nothing of it."""
    said = advice(tmp_path, {"student": set(range(20)), MIX: set(range(25)), "teacher": {0}})
    assert (
        said["verdict"] == "unknown" and f"{MIX} may cover more than the student alone (+12.5 points" in said["reason"]
    )


def test_without_the_student_alone(tmp_path):
    said = advice(tmp_path, {MIX: set(range(10)), "fixed_alpha=0.9": set(range(30))})
    assert said["name"] == "fixed_alpha=0.9" and "student" not in said["reason"]
    said = advice(tmp_path / "b", {MIX: set(range(10)), "fixed_alpha=0.9": set(range(11))})
    assert said["verdict"] == "unknown"


def test_nothing_accepted(tmp_path):
    found = probe_of(tmp_path, {"student": set(), MIX: set()})
    assert found["recommendation"]["verdict"] == "nothing" and found["recommendation"]["name"] is None
    assert found["arms"][0]["passes_per_accepted"] is None
    assert draw(found, tmp_path / "p.svg") == ["student", MIX]
    xml.dom.minidom.parse(str(tmp_path / "p.svg"))


def test_passes_that_a_setting_needs(tmp_path):
    """Where a server could not run the student alone the probe took two, and a run would take one."""
    config = config_of(output={"dir": str(tmp_path / "student")})
    make_run(tmp_path / "student", [record("p", tokens=4)], config)
    other = config_of(output={"dir": str(tmp_path / "m")})
    make_run(tmp_path / "m", [record("p", tokens=4)], other)
    student, mixture = assessed([Arm("student", "student", config), Arm("m", "mixture", other)])["arms"]
    assert (student["passes"], student["passes_taken"]) == (4, 8) and (mixture["passes"], mixture["passes_taken"]) == (
        8,
        8,
    )


def test_figures(tmp_path):
    """Of accepted samples: KL and log-probability a token as much as another; equations where texts have any."""
    texts = ["1 + 1 = 2. So 2.", "1 + 1 = 3.", "It is 2.", "2 * 2 = 4"]
    records = [record("p", k, text=text, tokens=k + 1) for k, text in enumerate(texts)]
    records[0].kl_to_student, records[0].student_logprob = [1.0], [-8.0]
    records.append(record("q", 0, text="3 + 3 = 6", accepted=False))
    one = config_of(output={"dir": str(tmp_path / "a")})
    make_run(tmp_path / "a", records, one)
    make_run(tmp_path / "b", [record("p", text="two"), record("q", accepted=False)], config_of())
    two = config_of(output={"dir": str(tmp_path / "b")})
    first, second = assessed([Arm("a", "mixture", one), Arm("b", "mixture", two)])["arms"]
    assert (first["sound"], first["with_equations"], first["accepted"]) == (2, 3, 4) and second["sound"] is None
    assert first["kl_to_student"] == pytest.approx((1 + 9 * 0.125) / 10) and first["surprising"] == 1
    assert first["student_logprob"] == pytest.approx((-8 - 9) / 10)
    low, high = first["student_logprob_interval"]  # one problem has all of them
    assert low == high == pytest.approx(-1.7)
    filtered = config_of(output={"dir": str(tmp_path / "a")}, filters=[{"type": "equations"}])
    made = assessed([Arm("a", "mixture", filtered), Arm("b", "mixture", two)])
    assert made["sound_by"] == "filter" and (made["arms"][0]["sound"], made["arms"][0]["with_equations"]) == (4, None)


# -- the command -----------------------------------------------------------------------------------------------------


def folder_probe(folder: Folder, url: str, *more: str) -> int:
    argv = ["probe", str(folder.root / "run.yaml"), "--data", str(folder.root / "problems.jsonl")]
    return main([*argv, "--out", str(folder.out), "--endpoint", url, *more])


def alpha_of(body: dict) -> float:
    """How much of the teacher a request asks for."""
    if "session_params" not in body:
        return 0.0
    fields = body["session_params"]["mixing"]
    return fields.get("fixed_alpha", fields.get("kl_budget", 0.5))


def behave(body: dict):
    """The more of the teacher, the more problems are solved: those below 40 α."""
    i = number(body)
    answer = stub_answer(body)
    answer["meta_info"]["finish_reason"] = {"type": "stop"}
    return 200, answer | {"text": f"1 + 1 = 2, so the answer is {i % 3 if i < 40 * alpha_of(body) else 7}."}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_a_probe(folder, capsys):
    folder.configure(mixing={"alpha_max": 0.9})
    other = folder.root / "other.json"
    with stub_server() as stub:
        stub.behave, stub.more_info = behave, {"plain_requests_of": ["student"]}
        settings = "student,kl_budget=0.1,fixed_alpha=0.5,fixed_alpha=0.75,teacher"
        argv = ("--settings", settings, "--json", str(other), "--n", "1", "--problems", "30")
        assert folder_probe(folder, stub.url, *argv) == 0
        assert len(stub.bodies) == 5 * 30 and sum("session_params" not in body for body in stub.bodies) == 30
        said = capsys.readouterr().out
        assert folder_probe(folder, stub.url, *argv) == 0 and len(stub.bodies) == 5 * 30  # nothing is left
        assert capsys.readouterr().out == said
    found = json.loads((folder.out / "probe.json").read_text())
    assert found == json.loads(other.read_text()) and found["problems"] == 30 and found["samples"] == 1
    # Below 40 α: none, 4, 20, 30 and all 30.
    assert {arm["name"]: arm["covered"] for arm in found["arms"]} == {
        "student": 0, "kl_budget=0.1": 4, "fixed_alpha=0.5": 20, "fixed_alpha=0.75": 30, "teacher": 30,
    }  # fmt: skip
    assert found["recommendation"]["verdict"] == "setting" and found["recommendation"]["name"] == "teacher"
    assert (
        "Take teacher. teacher covers 30 of 30 problems" in said and "fixed_alpha=0.75 is the cheapest mixture" in said
    )
    assert "30 problems, 1 samples of each" in said and "problems covered" in said
    assert "no point, for want of accepted samples with a student logprob: student" in said
    svg = (folder.out / "probe.svg").read_text()
    xml.dom.minidom.parseString(svg)
    assert "fixed_alpha=0.75" in svg and "problems covered, %" in svg and ">student<" not in svg
    runs = [str(folder.out / name) for name in ("student", "kl_budget=0.1")]
    assert manifest_of(Path(runs[0]))["models_run"] == "student"
    assert main(["compare", *runs]) == 0 and main(["report", runs[1]]) == 0


def test_more_problems_go_on(folder):
    """And every setting has the same problems and, with the draw, the same strategies."""
    with stub_server() as stub:
        stub.behave = behave
        argv = ("--settings", "student,fixed_alpha=0.5", "--problems")
        assert folder_probe(folder, stub.url, *argv, "5") == 0 and len(stub.bodies) == 20
        assert folder_probe(folder, stub.url, *argv, "8") == 0 and len(stub.bodies) == 32
        assert set(stub.seen.values()) == {2}  # one id, one seed, in both
    a, b = (rows_of(folder.out / name) for name in ("student", "fixed_alpha=0.5"))
    assert a.keys() == b.keys() and len(a) == 16
    assert folder_probe(folder, stub.url, "--settings", "student,fixed_alpha=0.5", "--problems", "8") == 0


def test_stopped_and_gone_on(folder, capsys):
    folder.configure(client={"concurrency": 4, "max_downtime": 0.2, "timeout": 5})
    argv = ("--settings", "student,fixed_alpha=0.5", "--problems", "10")
    with stub_server() as dying:
        dying.behave, dying.dies_after = behave, 25
        assert folder_probe(folder, dying.url, *argv) == 1
        assert "The same command goes on" in capsys.readouterr().err and not (folder.out / "probe.json").exists()
    with stub_server() as stub:
        stub.behave = behave
        assert folder_probe(folder, stub.url, *argv) == 0 and len(stub.bodies) <= 20
    assert len(rows_of(folder.out / "fixed_alpha=0.5")) == 20


def test_one_server_of_its_own(folder, monkeypatch):
    """It is started once for all settings, without the alpha keys, and not at all where nothing is missing."""
    started = []
    with stub_server() as stub:
        stub.behave = behave

        class Own:
            def __init__(self, mixing, server, log):
                started.append((mixing, server, log))
                self.url = stub.url

            async def __aenter__(self):
                return self

            async def __aexit__(self, *exc_info):
                started.append("stopped")

        monkeypatch.setattr("sglang_optimal.distill.server.OwnServer", Own)
        folder.configure(mixing={"student_model_path": "S", "kl_budget": 0.3}, server={"model_path": "T"})
        argv = ["probe", str(folder.root / "run.yaml"), "--data", str(folder.root / "problems.jsonl"), "--out"]
        argv += [str(folder.out), "--settings", "student,fixed_alpha=0.5", "--problems", "3"]
        assert main(argv) == 0
        assert started == [({"student_model_path": "S"}, {"model_path": "T"}, folder.out / "server.log"), "stopped"]
        assert main(argv) == 0 and len(started) == 2


def test_escalate_is_left_out_and_said(folder, capsys):
    folder.configure(escalate={"steps": [{"fixed_alpha": 0}, {"fixed_alpha": 1}]})
    with stub_server() as stub:
        stub.behave = behave
        assert folder_probe(folder, stub.url, "--settings", "student,teacher", "--problems", "2") == 0
    assert "escalate: is left out" in capsys.readouterr().err
    assert {row["step"] for row in rows_of(folder.out / "student").values()} == {None}


def test_failed_samples_are_tried_again(folder, capsys, monkeypatch):
    async def failing(arms, out, console):
        return [probing.RunResult(out, 1, None, 1)]

    monkeypatch.setattr(probing, "run_arms", failing)
    assert folder_probe(folder, "http://127.0.0.1:9", "--problems", "2") == 1
    assert "1 samples failed; the same command tries them again" in capsys.readouterr().err
