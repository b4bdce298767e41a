"""Runs of the student alone, or the teacher: plain requests, half the passes, and no series that nobody said."""

from __future__ import annotations

import json

import pytest
import yaml
from made_runs import config_of
from stub_server import stub_answer, stub_server
from test_run import PROBLEMS, Folder

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.one_model import own_server, planned
from sglang_optimal.distill.passes import passes
from sglang_optimal.distill.pipeline import seed_of

STUDENT, TEACHER = {"alpha_method": "fixed", "fixed_alpha": 0}, {"fixed_alpha": 1.0}
ALWAYS = {"n": 3, "max_new_tokens": 16, "one_model": "always"}
SERVED = {"plain_requests_of": ["student"]}
ONE = {"plain_requests_of": ["teacher", "student"]}

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path)
    made.configure(mixing=STUDENT)
    return made


def is_plain(body: dict) -> bool:
    return "session_params" not in body and "input_ids" in body and body["return_logprob"] is True


def models_run(folder) -> str:
    return json.loads((folder.out / "run.json").read_text())["models_run"]


def test_the_student_alone(folder, capsys):
    with stub_server(mixes=False) as stub:
        assert folder.run(stub.url) == 0
        assert all(is_plain(body) for body in stub.bodies) and set(stub.seen.values()) == {1}
        # What the student reads, asked once a problem; all strategies show it the same.
        assert len(stub.rendered) < 2 * PROBLEMS and models_run(folder) == "student"
        asked = {"".join(map(chr, body["input_ids"])) for body in stub.bodies}
    assert asked == {f"{i} + 1?" for i in range(PROBLEMS)}
    said = capsys.readouterr().err
    assert "serves served alone, which is taken for the student" in said
    assert "the student alone runs, one forward pass a token: teacher_logprob, kl_to_teacher, ess_ratio" in said
    rows = folder.check_complete()
    for name, row in rows.items():
        tokens = len(row["token_ids"])
        answer = stub_answer({"sampling_params": {"sampling_seed": seed_of(0, name)}, "return_logprob": True})
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        assert row["student_logprob"] == pytest.approx(logprobs) and row["mixture_logprob"] == row["student_logprob"]
        assert row["alpha"] == row["kl_to_student"] == [0.0] * tokens
        assert row["teacher_logprob"] == row["kl_to_teacher"] == row["ess_ratio"] == []
        assert row["mean_student_logprob"] == pytest.approx(sum(logprobs) / tokens)
        assert (row["mean_alpha"], row["mean_kl_to_student"], row["log_weight_student"]) == (0, 0, 0)
        for absent in ("mean_teacher_logprob", "mean_kl_to_teacher", "log_weight_teacher", "teacher_model"):
            assert row[absent] is None
        assert (row["student_model"], row["student_weight_version"]) == ("served", "default")
        assert row["student_prompt_ids"] == list(row["problem"].encode()) and row["teacher_prompt_ids"] == []
        assert row["teacher_prompt_tokens"] == 0
        sampling = json.loads(row["sampling"])
        assert (sampling["fixed_alpha"], sampling["model_run"]) == (0, "student") and passes(row) == tokens
    card = (folder.out / "README.md").read_text()
    assert "Samples of the student alone" in card and "| student | served |" in card
    assert main(["report", str(folder.out)]) == 0
    page = (folder.out / "report.html").read_text()
    assert "fixed at 0: the student alone ran" in page and "served" in page
    out = folder.root / "train.jsonl"
    assert main(["export", str(folder.out), "--output", str(out), "--format", "trl-tokens"]) == 0
    first = json.loads(out.read_text().splitlines()[0])
    assert first["input_ids"]


@pytest.mark.parametrize("info", [SERVED, ONE])
def test_a_server_that_mixes_and_serves_the_student(folder, stub, info):
    stub.more_info = info
    assert folder.run(stub.url) == 0
    assert all(is_plain(body) for body in stub.bodies)
    row = next(iter(folder.check_complete().values()))
    assert (row["student_model"], row["teacher_model"], row["teacher_weight_version"]) == ("student", None, None)


@pytest.mark.parametrize(
    "info", [{}, {"plain_requests_of": ["teacher"]}, {"plain_requests_of": []}, {"served_model": "student"}]
)
def test_a_server_of_the_teacher_mixes(folder, stub, capsys, info):
    stub.more_info = info
    assert folder.run(stub.url) == 0
    assert not any(is_plain(body) for body in stub.bodies) and models_run(folder) == "both"
    assert stub.bodies[0]["session_params"]["mixing"]["fixed_alpha"] == 0
    assert "both models run: " in capsys.readouterr().err
    row = next(iter(folder.check_complete().values()))
    assert row["teacher_logprob"] and passes(row) == 2 * len(row["token_ids"])
    folder.out = folder.root / "asked"
    folder.configure(mixing=STUDENT, sampling=ALWAYS)
    assert folder.run(stub.url) == 2
    assert "as sampling.one_model: always asks" in capsys.readouterr().err
    assert not folder.rows()


def test_a_router_does_not_tell(folder, capsys):
    with stub_server(router=True) as router:
        assert folder.run(router.url) == 0
        assert not any(is_plain(body) for body in router.bodies)


def test_never(folder, stub, capsys):
    folder.configure(mixing=STUDENT, sampling={**ALWAYS, "one_model": "never"})
    stub.more_info = SERVED
    assert folder.run(stub.url) == 0
    assert not any(is_plain(body) for body in stub.bodies)
    with stub_server(mixes=False) as alone:
        assert folder.run(alone.url, more=("--n", "4")) == 2
    assert "runs no student" in capsys.readouterr().err


def test_the_teacher_alone_if_asked(folder, stub, capsys):
    """By default the student reads along: how likely it finds the teacher's text is what the run is for."""
    folder.configure(mixing=TEACHER)
    assert folder.run(stub.url) == 0
    assert not any(is_plain(body) for body in stub.bodies)
    assert "the student reads along, for its log-probabilities" in capsys.readouterr().err
    folder.out = folder.root / "alone"
    folder.configure(mixing=TEACHER, sampling=ALWAYS)
    stub.more_info = {"plain_requests_of": ["teacher"]}
    assert folder.run(stub.url) == 0
    assert all(is_plain(body) for body in stub.bodies[3 * PROBLEMS :]) and models_run(folder) == "teacher"
    row = next(iter(folder.check_complete().values()))
    assert row["teacher_logprob"] == row["mixture_logprob"] and row["alpha"] == [1.0] * len(row["token_ids"])
    assert row["student_logprob"] == row["kl_to_student"] == [] and row["log_weight_student"] is None
    assert row["teacher_prompt_tokens"] == len(row["teacher_prompt_ids"]) > 0 and row["student_prompt_ids"] == []
    assert (row["teacher_model"], row["student_model"]) == ("teacher", None)
    assert main(["report", str(folder.out)]) == 0


NEEDS_TEACHER = {"type": "kl", "max_mean_to_teacher": 1}


def test_filters_that_need_the_other_model(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.root)
    (folder.root / "mine.py").write_text("def keep(record):\n    return sum(record.teacher_logprob) < 0\n")
    with stub_server(mixes=False) as stub:
        folder.configure(mixing=STUDENT, filters=[{"type": "length", "min_tokens": 9999}, NEEDS_TEACHER])
        assert folder.run(stub.url) == 2
        assert "filters[1] (kl): needs kl_to_teacher of every token, which the student alone" in capsys.readouterr().err
        assert not stub.bodies
        folder.configure(mixing=STUDENT, filters=[{"type": "function", "function": "mine:keep"}])
        assert folder.run(stub.url) == 2
        assert "filters: function: needs teacher_logprob of every token, which the student" in capsys.readouterr().err
        kinds = [
            {"type": "alpha", "max_mean": 0.1}, {"type": "coverage", "min_mean_logprob": -9}, {"type": "finish"},
            {"type": "kl", "max_mean_to_student": 0.1, "max_token_to_student": 0.1},
        ]  # fmt: skip
        folder.out = folder.root / "all"
        folder.configure(mixing=STUDENT, filters=kinds)
        assert folder.run(stub.url) == 0
        assert {row["rejected_by"] for row in folder.check_complete().values()} == {None, "finish"}
    (folder.root / "new.yaml").write_text(yaml.safe_dump({"filters": [NEEDS_TEACHER]}))
    flags = ["--config", str(folder.root / "new.yaml"), "--out", str(folder.root / "again")]
    assert main(["filter", str(folder.out), *flags]) == 2
    assert "filters[0] (kl): needs kl_to_teacher" in capsys.readouterr().err
    flags = ["--best", "1", "--by", "length", "--out", str(folder.root / "again"), "--no-report"]
    assert main(["filter", str(folder.out), *flags]) == 0
    assert json.loads((folder.root / "again" / "run.json").read_text())["models_run"] == "student"


@pytest.mark.parametrize(
    "output", [{"series": ["student_entropy"]}, {"return_top_k": 4}, {"return_top_k": 2, "top_k_of": "student"}]
)
def test_what_takes_both_models(folder, stub, capsys, output):
    stub.more_info = SERVED
    folder.configure(mixing=STUDENT, output=output)
    assert folder.run(stub.url) == 0
    assert not any(is_plain(body) for body in stub.bodies)
    assert f"both models run: output.{next(iter(output))}" in capsys.readouterr().err
    folder.configure(mixing=STUDENT, output=output, sampling=ALWAYS)
    folder.out = folder.root / "asked"
    assert folder.run(stub.url) == 2
    assert f"sampling.one_model: 'always', but output.{next(iter(output))}" in capsys.readouterr().err
    assert not folder.out.exists()


def test_a_run_goes_on_as_it_began(folder, stub, capsys):
    stub.more_info = SERVED
    assert folder.run(stub.url, more=("--limit", "5")) == 0
    stub.more_info = {}
    assert folder.run(stub.url) == 2
    assert "as the run has begun" in capsys.readouterr().err
    with stub_server(mixes=False) as alone:
        assert folder.run(alone.url) == 0
        assert all(is_plain(body) for body in alone.bodies) and len(alone.bodies) == 3 * (PROBLEMS - 5)
    folder.check_complete()


def test_a_run_of_before_goes_on_with_both(folder, stub):
    """An older version ran both, and said nothing of it."""
    assert folder.run(stub.url, more=("--limit", "5")) == 0
    path = folder.out / "run.json"
    manifest = json.loads(path.read_text())
    del manifest["models_run"], manifest["config"]["sampling"]["one_model"]
    path.write_text(json.dumps(manifest))
    stub.more_info = SERVED
    assert folder.run(stub.url) == 0
    assert not any(is_plain(body) for body in stub.bodies)


def test_prefixes_variables_and_plain_text(folder):
    contexts = {
        "student": {"system": "s", "user": "{problem}", "assistant": "Well, "},
        "strategies": [{"teacher": {"user": "{problem} {answer}", "assistant": "Well, "}}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    with stub_server(mixes=False) as stub:
        folder.configure(mixing=STUDENT, contexts=contexts)
        assert folder.run(stub.url, more=("--limit", "2")) == 0
        for body in stub.rendered:
            assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant"]
            assert body["continue_final_message"] is True
            assert body["chat_template_kwargs"] == {"enable_thinking": False}
        folder.out = folder.root / "text"
        folder.configure(
            mixing=STUDENT,
            contexts={"format": "text", "student": "Q: {problem}", "strategies": [{"teacher": "{answer}"}]},
        )
        stub.rendered.clear()
        assert folder.run(stub.url, more=("--limit", "2")) == 0
        assert {body["prompt"] for body in stub.rendered} == {"Q: 0 + 1?", "Q: 1 + 1?"}


def test_what_the_student_really_read_is_looked_at(folder, capsys):
    """Decoded from its token ids, as in a mixture."""
    (folder.root / "problems.jsonl").write_text(
        '{"key": "p", "problem": "Say it", "answer": "a secret of many words"}\n'
    )
    with stub_server(mixes=False) as stub:
        stub.decode = lambda ids: "Say a secret of many words"
        assert folder.run(stub.url) == 2
    assert "gives away 'answer'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mixing", "server", "side", "expected"),
    [
        ({}, {"model_path": "M", "revision": "r", "tokenizer_path": "t"}, "student",
         {"model_path": "M", "revision": "r", "tokenizer_path": "t"}),
        ({"student_model_path": "S", "student_max_total_tokens": 9}, {"model_path": "T", "revision": "r",
          "tokenizer_path": "t", "context_length": 8}, "student", {"model_path": "S", "context_length": 8}),
        ({"student_model_path": "S", "student_revision": "s"}, {"model_path": "T", "revision": "r"}, "student",
         {"model_path": "S", "revision": "s"}),
        ({"student_model_path": "S"}, {"model_path": "T", "revision": "r"}, "teacher",
         {"model_path": "T", "revision": "r"}),
        ({"teacher_model_path": "T"}, {"model_path": "S", "revision": "r"}, "student",
         {"model_path": "S", "revision": "r"}),
        ({"teacher_model_path": "T", "teacher_revision": "t"}, {"model_path": "S"}, "teacher",
         {"model_path": "T", "revision": "t"}),
        ({"student_model_path": "S", "student_chat_template": "chatml"},
         {"model_path": "T", "chat_template": "a.jinja"}, "student", {"model_path": "S", "chat_template": "chatml"}),
        ({"student_model_path": "S", "student_chat_template": "own"}, {"model_path": "T", "chat_template": "a.jinja"},
         "student", {"model_path": "S"}),
        ({"student_model_path": "S"}, {"model_path": "T", "chat_template": "a.jinja"}, "student",
         {"model_path": "S", "chat_template": "a.jinja"}),
    ],
)  # fmt: skip
def test_the_run_s_own_server(mixing, server, side, expected):
    config = config_of(mixing=mixing | STUDENT, server=server)
    assert own_server(config, side) == ({"student_weights": "none"}, expected)


def test_an_adapter_needs_the_teacher_beside_it():
    lora = {"student_lora_path": "adapter"} | STUDENT
    side, why = planned(config_of(mixing=lora, server={"model_path": "T"}))
    assert side is None and "student_lora_path" in str(why)
    assert planned(config_of(mixing=lora, client={"endpoints": ["http://x:1"]})) == ("student", None)


@pytest.mark.parametrize("mixing", [{}, {"fixed_alpha": 0.5}, {"kl_budget": 0.1}, {"fixed_alpha": -1.0}])
def test_mixtures_are_no_model_s_alone(mixing):
    assert planned(config_of(mixing=mixing)) == (None, None)
    with pytest.raises(ValueError, match=r"one_model: 'always' needs mixing.fixed_alpha: 0 .* or 1"):
        planned(config_of(mixing=mixing, sampling={"one_model": "always"}))
