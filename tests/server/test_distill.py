"""Distillation runs against a real server: records are what the oracle says."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from serving import server_info
from tiny_models import small_chat_ids, small_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.export import export
from sglang_optimal.distill.records import OPTIONAL_COLUMNS
from sglang_optimal.distill.report import write_report
from sglang_optimal.names import MORE_SERIES, SERIES, SIDES
from sglang_optimal.train import Objective, RecordCollator

PROBLEMS = [
    {"key": f"p{i}", "question": f"what is {i} + {i}?", "answer": f"it is {2 * i}, of course."} for i in range(6)
]


def run(tmp_path, client, name="out", status=0, **settings):
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    settings = {
        "data": {"fields": {"id": "key", "problem": "question"}},
        "contexts": {
            "student": "{problem}",
            "strategies": [
                {"name": "told", "teacher": "{problem} hint: {answer}"},
                {"name": "system", "teacher": {"system": "say: {answer}", "user": "{problem}"}},
            ],
            "select": "cross",
        },
        "sampling": {"temperature": 0, "max_new_tokens": 12},
        **settings,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / name
    url = str(client.base_url).rstrip("/")
    argv = ["run", str(tmp_path / "run.yaml"), "--data", str(tmp_path / "problems.jsonl"), "--out", str(out)]
    assert main([*argv, "--endpoint", url]) == status
    return out


def rows_of(out) -> dict[str, dict]:
    return {row["id"]: row for row in datasets.load_dataset(str(out), split="train")}


def test_greedy_records_are_the_oracle_s(client, tiny_oracle, tiny_pair, tmp_path):
    rows = rows_of(run(tmp_path, client))
    assert set(rows) == {f"p{i}/{strategy}/0" for i in range(6) for strategy in ("told", "system")}
    for i in (0, 3):
        question, answer = PROBLEMS[i]["question"], PROBLEMS[i]["answer"]
        student = small_chat_ids(("user", question))
        for strategy, teacher in (
            ("told", small_chat_ids(("user", f"{question} hint: {answer}"))),
            ("system", small_chat_ids(("system", f"say: {answer}"), ("user", question))),
        ):
            row = rows[f"p{i}/{strategy}/0"]
            expected = tiny_oracle.generate_greedy(teacher, student, len(row["token_ids"]))
            assert row["token_ids"] == expected.token_ids
            assert row["teacher_prompt_tokens"] == len(teacher)
            for name, values in (
                ("alpha", expected.alphas),
                ("teacher_logprob", expected.teacher_logprobs),
                ("student_logprob", expected.student_logprobs),
                ("mixture_logprob", expected.mixture_logprobs),
            ):
                np.testing.assert_allclose(row[name], values, atol=2e-4)
            weight = sum(expected.student_logprobs) - sum(expected.mixture_logprobs)
            assert row["log_weight_student"] == pytest.approx(weight, abs=2e-3)
            assert row["mean_alpha"] == pytest.approx(np.mean(expected.alphas), abs=1e-4)
    row = rows["p0/told/0"]
    assert (row["teacher_model"], row["student_model"]) == tuple(map(str, tiny_pair))
    assert row["sglang_version"] == server_info(client)["version"]


def test_alpha_settings_go_with_the_requests(client, tmp_path):
    rows = rows_of(run(tmp_path, client, mixing={"fixed_alpha": 0.25}))
    assert all(alpha == 0.25 for row in rows.values() for alpha in row["alpha"])
    assert json.loads(rows["p0/told/0"]["sampling"])["fixed_alpha"] == 0.25


def test_plain_contexts(client, tiny_oracle, tmp_path):
    contexts = {"format": "text", "student": "{problem}", "strategies": [{"teacher": "{answer} {problem}"}]}
    rows = rows_of(run(tmp_path, client, contexts=contexts))
    row = rows["p1/default/0"]
    question, answer = PROBLEMS[1]["question"], PROBLEMS[1]["answer"]
    assert (row["student_text"], row["student_messages"]) == (question, None)
    teacher, student = small_ids(f"{answer} {question}"), small_ids(question)
    expected = tiny_oracle.generate_greedy(teacher, student, len(row["token_ids"]))
    assert row["token_ids"] == expected.token_ids


@pytest.mark.parametrize("student", ["text", "chat"])
def test_a_text_beside_a_chat(client, tiny_oracle, tiny_pair, tmp_path, capsys, student):
    """A base student reads plain text and its teacher a chat, or the other way round; preview shows what both read."""
    teacher = {"text": "chat", "chat": "text"}[student]
    contexts = {
        "format": {"teacher": teacher, "student": student},
        "student": "{problem}",
        "strategies": [{"name": "told", "teacher": "{answer} {problem}"}],
    }
    out = run(tmp_path, client, contexts=contexts)
    rows = rows_of(out)
    argv = ["--data", str(tmp_path / "problems.jsonl"), "--tokenizer", str(tiny_pair[0])]
    capsys.readouterr()
    assert main(["preview", str(tmp_path / "run.yaml"), *argv, "--problems", "6", "--json"]) == 0
    previewed = {shown["problem"]: shown for shown in json.loads(capsys.readouterr().out)["problems"]}
    assert len(rows) == 6
    for i, problem in enumerate(PROBLEMS):
        texts = {"student": problem["question"], "teacher": f"{problem['answer']} {problem['question']}"}
        forms = {"text": small_ids, "chat": lambda text: small_chat_ids(("user", text))}
        ids = {side: forms[form](texts[side]) for side, form in contexts["format"].items()}
        row = rows[f"p{i}/told/0"]
        assert (row["teacher_prompt_ids"], row["student_prompt_ids"]) == (ids["teacher"], ids["student"])
        assert row[f"student_{'messages' if student == 'text' else 'text'}"] is None
        expected = tiny_oracle.generate_greedy(ids["teacher"], ids["student"], len(row["token_ids"]))
        assert row["token_ids"] == expected.token_ids
        np.testing.assert_allclose(row["alpha"], expected.alphas, atol=2e-4)
        for side in ("teacher", "student"):
            reading = previewed[f"p{i}"][side][0]["reading"]
            assert reading["text"] == AutoTokenizer.from_pretrained(tiny_pair[0]).decode(ids[side])
            assert reading["tokens"] == len(ids[side])
    done = export(out, tmp_path / "sft.jsonl", "trl-sft", on_mismatch="keep")
    assert done.checked and done.written == 6 and "prompt" not in done.differing
    first = json.loads((tmp_path / "sft.jsonl").read_text().splitlines()[0])
    assert isinstance(first["prompt"], str) == (student == "text")


def test_sampled_filtered_and_reported(client, tmp_path):
    out = run(
        tmp_path, client,
        sampling={"n": 4, "temperature": 1.0, "max_new_tokens": 16, "top_p": 0.95, "stop": "e"},
        filters=[{"type": "finish"}, {"type": "length", "min_tokens": 3}, {"type": "deduplicate"}],
    )  # fmt: skip
    accepted = rows_of(out)
    rejected = datasets.load_dataset(str(out), "rejected", split="train")
    assert len(accepted) + len(rejected) == 48 and len(rejected) > 0 and accepted
    assert {row["rejected_by"] for row in rejected} <= {"finish", "length", "deduplicate"}
    for row in (*accepted.values(), *rejected):
        assert all(len(row[name]) == row["num_tokens"] == len(row["token_ids"]) for name in SERIES)
        assert "e" not in row["text"]
        alpha, teacher, student, mixture = (
            np.array(row[name]) for name in ("alpha", "teacher_logprob", "student_logprob", "mixture_logprob")
        )
        # log q* = (1−α)·log p_s + α·log p_t − A(α), and −A is both KLs at the point of symmetry.
        gap = mixture - ((1 - alpha) * student + alpha * teacher)
        np.testing.assert_allclose(gap, row["kl_to_student"], atol=2e-3)
        np.testing.assert_allclose(row["kl_to_student"], row["kl_to_teacher"], atol=2e-3)
    assert all(row["num_tokens"] >= 3 and row["finish_reason"] == "stop" for row in accepted.values())
    assert write_report(out).read_text().count("<svg") > 3


def test_too_long_for_the_server(client, tmp_path):
    """Refused requests are kept with the server's message, and the others go on."""
    contexts = {
        "student": "{% if problem[8] == '3' %}{{ 'long ' * 400 }}{% endif %}{problem}",
        "strategies": [{"teacher": "{problem} {answer}"}],
    }
    out = run(tmp_path, client, contexts=contexts)
    assert len(rows_of(out)) == 5
    (row,) = datasets.load_dataset(str(out), "rejected", split="train")
    assert row["problem_id"] == "p3" and row["rejected_by"] == "server" and "student" in row["reject_reason"]


def test_a_setting_that_the_server_refuses(client, tmp_path, capsys):
    settings = {"sampling": {"max_new_tokens": 50, "min_new_tokens": 60}}
    run(tmp_path, client, status=2, **settings)
    assert "the server refuses every request: min_new_tokens" in capsys.readouterr().err


def test_more_series_and_most_likely_tokens(client, tiny_pair, tmp_path):
    """With as many tokens as there are, the record holds whole distributions: they sum to one, their KL is the series,
    and a student that is trained on them begins where it sampled."""
    out = run(
        tmp_path, client,
        sampling={"temperature": 0.8, "max_new_tokens": 12},
        output={"series": list(MORE_SERIES), "return_top_k": 1000, "top_k_of": list(SIDES)},
    )  # fmt: skip
    rows = list(rows_of(out).values())
    assert len(rows) == 12
    for row in rows:
        assert all(len(row[name]) == row["num_tokens"] for name in OPTIONAL_COLUMNS)
        np.testing.assert_allclose(row["behaviour_logprob"], row["mixture_logprob"], atol=1e-5)  # nothing was cut
        for side in SIDES:
            ids = row[f"top_k_{side}_ids"]
            for i, token in enumerate(row["token_ids"]):
                assert 1 < len(ids[i]) == len(set(ids[i])) < 1000
                logprobs = {of: np.array(row[f"top_k_{side}_{of}_logprobs"][i]) for of in SIDES}
                for of in SIDES:
                    assert np.exp(logprobs[of]).sum() == pytest.approx(1, abs=1e-4)
                    assert row[f"top_k_{side}_{of}_tail"][i] == pytest.approx(0, abs=1e-4)
                    assert logprobs[of][ids[i].index(token)] == pytest.approx(row[f"{of}_logprob"][i], abs=1e-4)
                kl = (np.exp(logprobs["teacher"]) * (logprobs["teacher"] - logprobs["student"])).sum()
                assert row["kl_teacher_student"][i] == pytest.approx(kl, abs=1e-4)
                if side != "mixture":
                    assert 1 <= row[f"{side}_rank"][i] <= ids[i].index(token) + 1
                assert list(logprobs[side]) == sorted(logprobs[side], reverse=True)
    objective = Objective("mixture_kl")
    batch = RecordCollator(objective)(rows)
    student = AutoModelForCausalLM.from_pretrained(tiny_pair[1], dtype=torch.float32).eval()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = student(**inputs).logits[:, -batch["mask"].shape[1] - 1 : -1]
    losses, _ = objective(logits[..., : 1 + int(batch["top_k_ids"].max())], batch)
    for row, loss in zip(rows, losses, strict=True):
        np.testing.assert_allclose(loss[: row["num_tokens"]], row["kl_to_student"], atol=2e-3)
