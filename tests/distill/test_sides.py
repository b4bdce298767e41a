"""Runs whose sides read in different forms: a plain text beside a chat, and template variables for each side."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import yaml
from stub_server import stub_answer, stub_server
from tiny_models import smollm2_tokenizer_dir
from transformers import AutoTokenizer

from sglang_optimal.distill.card import read_as
from sglang_optimal.distill.cli import main
from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.export import export
from sglang_optimal.distill.pipeline import fingerprint
from sglang_optimal.distill.store import find_shards, read_rows

pytestmark = pytest.mark.usefixtures("impatient")
BASE_STUDENT = {"teacher": "chat", "student": "text"}
CHAT_STUDENT = {"teacher": "text", "student": "chat"}


def run_file(folder: Path, contexts: dict, **sections) -> str:
    rows = [{"id": f"p{i}", "problem": f"{i} + 1? é", "answer": f"it is {i + 1}"} for i in range(4)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "data": {"path": str(folder / "problems.jsonl"), "fields": {"id": "id"}},
        "contexts": {
            "student": "Q: {problem}\nA:",
            "strategies": [{"name": "told", "teacher": "{problem} {answer}"}],
            **contexts,
        },
        "output": {"dir": str(folder / "out")},
        "client": {"concurrency": 1},  # in their order
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "run.yaml")


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["id"]: row for row in read_rows(find_shards(folder / "out", "accepted"))}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_base_student_reads_text_and_its_teacher_a_chat(tmp_path, stub, format, capsys):
    strategies = [{"name": "told", "teacher": {"system": "say {answer}", "user": "{problem}"}}]
    contexts = {"format": BASE_STUDENT, "strategies": strategies, "teacher_chat_template_kwargs": {"thinking": False}}
    run = run_file(tmp_path, contexts, output={"dir": str(tmp_path / "out"), "format": format})
    assert main(["run", run, "--endpoint", stub.url, "--shard", "0/2"]) == 0
    assert main(["run", run, "--endpoint", stub.url, "--shard", "1/2"]) == 0
    fields = stub.bodies[0]["session_params"]["mixing"]
    assert "text" not in stub.bodies[0] and "student_messages" not in fields
    assert fields["student_text"] == "Q: 0 + 1? é\nA:"
    assert fields["teacher_messages"] == [
        {"role": "system", "content": "say it is 1"}, {"role": "user", "content": "0 + 1? é"},
    ]  # fmt: skip
    assert fields["teacher_chat_template_kwargs"] == {"thinking": False}
    assert "student_chat_template_kwargs" not in fields
    rows = rows_of(tmp_path)
    assert len(rows) == 4
    row = rows["p0/told/0"]
    assert (row["student_text"], row["student_messages"]) == ("Q: 0 + 1? é\nA:", None)
    assert (row["teacher_text"], row["teacher_messages"]) == (None, fields["teacher_messages"])
    assert "| read as | teacher: chat, student: plain text |" in (tmp_path / "out" / "README.md").read_text()
    assert (
        '<th scope="row">read as</th><td>teacher: chat, student: plain text</td>'
        in (tmp_path / "out" / "report.html").read_text()
    )
    export(tmp_path / "out", tmp_path / "sft.jsonl", "trl-sft", check=False)
    first = json.loads((tmp_path / "sft.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "Q: 0 + 1? é\nA:", "completion": row["text"]}
    for name in ("sdft", "slime"):
        export(tmp_path / "out", tmp_path / f"{name}.parquet", name)
    (first, *_) = _parquet(tmp_path / "slime.parquet")
    assert first["prompt"] == "Q: 0 + 1? é\nA:" and first["metadata"]["teacher_prompt"] == fields["teacher_messages"]
    with pytest.raises(ValueError, match="use trl-sft or text"):
        export(tmp_path / "out", tmp_path / "no.jsonl", "sft", check=False)
    with pytest.raises(ValueError, match="use slime or sdft"):
        export(tmp_path / "out", tmp_path / "no.parquet", "verl")


def _parquet(path: Path) -> list[dict]:
    return parquet.read_table(path).to_pylist()


def test_the_other_way_round(tmp_path, stub):
    contexts = {"format": CHAT_STUDENT, "student": "{problem}", "student_chat_template_kwargs": {"thinking": True}}
    assert main(["run", run_file(tmp_path, contexts), "--endpoint", stub.url, "--no-report"]) == 0
    body, fields = stub.bodies[0], stub.bodies[0]["session_params"]["mixing"]
    assert body["text"] == "0 + 1? é it is 1" and "teacher_messages" not in fields
    assert fields["student_messages"] == [{"role": "user", "content": "0 + 1? é"}]
    assert fields["student_chat_template_kwargs"] == {"thinking": True}
    row = rows_of(tmp_path)["p0/told/0"]
    assert (row["student_text"], row["teacher_text"]) == (None, "0 + 1? é it is 1")
    export(tmp_path / "out", tmp_path / "sft.jsonl", "sft", check=False)
    first = json.loads((tmp_path / "sft.jsonl").read_text().splitlines()[0])
    assert first["messages"] == [
        {"role": "user", "content": "0 + 1? é"}, {"role": "assistant", "content": row["text"]},
    ]  # fmt: skip
    assert first["chat_template_kwargs"] == {"thinking": True}
    export(tmp_path / "out", tmp_path / "verl.parquet", "verl")
    (first, *_) = _parquet(tmp_path / "verl.parquet")
    assert first["extra_info"]["teacher_prompt"] == "0 + 1? é it is 1"


def test_variables_for_each_side(tmp_path, stub):
    """One side's own win over those of both."""
    contexts = {"chat_template_kwargs": {"a": 1, "b": 1}, "student_chat_template_kwargs": {"b": 2, "c": 3}}
    assert main(["run", run_file(tmp_path, contexts), "--endpoint", stub.url, "--no-report"]) == 0
    fields = stub.bodies[0]["session_params"]["mixing"]
    assert fields["teacher_chat_template_kwargs"] == {"a": 1, "b": 1}
    assert fields["student_chat_template_kwargs"] == {"a": 1, "b": 2, "c": 3}
    assert json.loads(rows_of(tmp_path)["p0/told/0"]["sampling"])["student_chat_template_kwargs"]["b"] == 2


def test_an_assistant_s_prefix_of_the_teacher_s_alone(tmp_path, stub):
    teacher = {"user": "{problem} {answer}", "assistant": "So:"}
    contexts = {"format": BASE_STUDENT, "strategies": [{"name": "told", "teacher": teacher}]}
    assert main(["run", run_file(tmp_path, contexts), "--endpoint", stub.url, "--no-report"]) == 0
    assert stub.bodies[0]["session_params"]["mixing"]["teacher_messages"][-1] == {"role": "assistant", "content": "So:"}


def test_the_guard_looks_at_a_text(tmp_path, stub, capsys):
    contexts = {"format": BASE_STUDENT, "student": "{problem} {answer}"}
    assert main(["run", run_file(tmp_path, contexts), "--endpoint", stub.url]) == 2
    assert "contexts.student: shows the student 'answer'" in capsys.readouterr().err
    run = run_file(tmp_path, {"format": BASE_STUDENT})

    def behave(body):
        answer = stub_answer(body)
        answer["meta_info"]["student_prompt_text"] = "<s>The answer is: it is 1."
        return 200, answer

    stub.behave = behave
    assert main(["run", run, "--endpoint", stub.url, "--no-report"]) == 2
    assert "what the student reads gives away 'answer' ('it is 1')" in capsys.readouterr().err


def test_another_form_is_another_run(tmp_path, stub, capsys):
    def config(**contexts):
        student = {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]}
        return parse_config({"contexts": {**student, **contexts}})

    prints = [fingerprint(config(format=form)) for form in ("chat", "text", BASE_STUDENT, CHAT_STUDENT)]
    assert len(set(prints)) == 4
    same = {"teacher": "text", "student": "text"}
    assert config(format=same).contexts.format == "text" and fingerprint(config(format=same)) == prints[1]
    assert fingerprint(config(teacher_chat_template_kwargs={"a": 1})) != prints[0]
    assert main(["run", run_file(tmp_path, {}), "--endpoint", stub.url, "--no-report"]) == 0
    assert main(["run", run_file(tmp_path, {"format": BASE_STUDENT}), "--endpoint", stub.url, "--no-report"]) == 2
    assert "holds a run with other settings (contexts.format)" in capsys.readouterr().err
    run_file(tmp_path, {})
    assert main(["run", str(tmp_path / "run.yaml"), "--endpoint", stub.url, "--n", "2", "--no-report"]) == 0
    assert len(rows_of(tmp_path)) == 8


@pytest.mark.parametrize(
    ("contexts", "words"),
    [
        ({"format": "chat"}, "teacher: chat, student: chat"),
        ({"format": "text"}, "teacher: plain text, student: plain text"),
        ({"format": CHAT_STUDENT}, "teacher: plain text, student: chat"),
        ({}, None),
        (None, None),
    ],
)
def test_read_as(contexts, words):
    """Runs of before have a word, or no settings at all."""
    assert read_as({"contexts": contexts}) == words and read_as({}) is None


def test_what_the_student_read_is_compared(tmp_path, capsys):
    """With real ids: the text of a student beside a chat comes back from the trainer's tokenizer as it was sampled."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_tokenizer_dir())

    def behave(body):
        answer = stub_answer(body)
        text = body["session_params"]["mixing"]["student_text"]
        ids = [*tokenizer(" It is 2.")["input_ids"], tokenizer.eos_token_id]
        answer |= {"text": " It is 2.", "output_ids": ids}
        meta = answer["meta_info"]
        meta |= {name: [-0.5] * len(ids) for name, value in meta.items() if isinstance(value, list)}
        meta |= {"finish_reason": {"type": "stop"}, "student_prompt_ids": tokenizer(text)["input_ids"]}
        return 200, answer

    with stub_server() as stub:
        stub.behave = behave
        run = run_file(tmp_path, {"format": BASE_STUDENT})
        assert main(["run", run, "--endpoint", stub.url, "--no-report"]) == 0
    argv = ["export", str(tmp_path / "out"), "--output", str(tmp_path / "sft.jsonl"), "--tokenizer"]
    assert main([*argv, str(smollm2_tokenizer_dir())]) == 0
    assert "sft.jsonl: 4 records, compared with what was sampled\n" in capsys.readouterr().out
