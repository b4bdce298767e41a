"""A run's problems for trainers that sample themselves: verl, TRL's SDFT and SDPO, slime."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pyarrow.parquet as parquet
import pytest
import yaml
from stub_server import stub_server
from test_export import PREFIX, STUDENT, read
from tiny_models import build_tiny_tokenizer_model

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.export import FORMATS, PROBLEMS, export
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.store import RecordStore

GUIDE = (Path(__file__).parents[2] / "docs" / "distillation_guide.md").read_text()
HINT = [STUDENT[0], {"role": "user", "content": "what is 3 + 4?\n\nhint: 7"}]
COPY = [STUDENT[0], {"role": "user", "content": "what is 3 + 4?\n\ncopy this: 7"}]
PROBLEM = {"problem": "what is 3 + 4?", "answer": "7"}


def sample(problem, strategy="hint", k=0, *, accepted=True, fields=PROBLEM, student=STUDENT, teacher=HINT) -> Record:
    return Record(
        f"{problem}/{strategy}/{k}", problem, strategy, k, fields, teacher, student, "it is 7", [20], "stop",
        accepted=accepted, rejected_by=None if accepted else "answer",
    )  # fmt: skip


def run_of(folder, *records, config=None) -> Path:
    store = RecordStore(folder)
    for record in records:
        store.append(record)
    store.finalize()
    store.write_json(store.manifest_path, {"state": "complete", "config": config or {}})
    store.close()
    return folder


CONFIG = {
    "data": {"path": "openai/gsm8k", "split": "train[:100]"},
    "contexts": {"strategies": [{"name": "hint"}, {"name": "copy"}]},
}
KNOWN = {"problem_id": "p0", "strategy": "hint", "teacher_prompt": HINT}
FIRST = {
    "verl": {
        "data_source": "openai/gsm8k",
        "prompt": STUDENT,
        "ability": "general",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"split": "train", "index": 0, **KNOWN},
    },
    "sdft": {"prompt": STUDENT, "privileged_context": "7"},
    "slime": {"prompt": STUDENT, "label": "7", "metadata": {"source_name": "openai/gsm8k", **KNOWN}},
}


@pytest.mark.parametrize(
    ("format", "suffix"),
    [("verl", "parquet"), *((name, suffix) for name in ("sdft", "slime") for suffix in ("jsonl", "parquet"))],
)
def test_a_row_a_problem(tmp_path, format, suffix):
    """Not one a sample, and none of a problem of which nothing was accepted."""
    records = [sample("p0"), sample("p0", k=1), sample("p1", accepted=False), sample("p2", k=3)]
    output = tmp_path / f"out.{suffix}"
    done = export(run_of(tmp_path / "run", *records, config=CONFIG), output, format)
    assert (done.written, done.checked, done.left_out, done.with_others) == (2, False, {}, 0)
    rows = read(output)
    assert len(rows) == 2 and rows[0] == FIRST[format]
    if format == "verl":
        assert [row["extra_info"]["index"] for row in rows] == [0, 1]
        assert [row["extra_info"]["problem_id"] for row in rows] == ["p0", "p2"]


def test_verl_s_types(tmp_path):
    """As verl's own examples of data have them; more rows than are written at once."""
    output = tmp_path / "out.parquet"
    export(run_of(tmp_path / "run", *(sample(f"p{i}") for i in range(300)), config=CONFIG), output, "verl")
    features = datasets.load_dataset("parquet", data_files=str(output))["train"].features
    text, number = datasets.Value("string"), datasets.Value("int64")
    messages = datasets.List({"role": text, "content": text})
    assert dict(features) == {
        "data_source": text,
        "prompt": messages,
        "ability": text,
        "reward_model": {"style": text, "ground_truth": text},
        "extra_info": {
            "split": text, "index": number, "problem_id": text, "strategy": text, "teacher_prompt": messages,
        },
    }  # fmt: skip
    assert parquet.read_metadata(output).num_rows == 300


def test_the_problem_s_own_data_source_and_ability(tmp_path):
    fields = {**PROBLEM, "data_source": "math_dapo", "ability": "MATH"}
    run = run_of(tmp_path / "run", sample("p0", fields=fields), config=CONFIG)
    export(run, tmp_path / "out.parquet", "verl")
    row = read(tmp_path / "out.parquet")[0]
    assert (row["data_source"], row["ability"]) == ("math_dapo", "MATH")
    export(run, tmp_path / "out.jsonl", "slime")
    assert read(tmp_path / "out.jsonl")[0]["metadata"]["source_name"] == "math_dapo"


def test_a_local_file_s_name_is_the_source_without_its_folder(tmp_path):
    run = run_of(tmp_path / "run", sample("p0"), config={"data": {"path": "/home/me/problems.jsonl"}})
    export(run, tmp_path / "out.parquet", "verl")
    assert read(tmp_path / "out.parquet")[0]["data_source"] == "problems.jsonl"


def test_the_first_accepted_sample_s_contexts(tmp_path, capsys):
    """Of strategies at the same sample, that of the one which the run's file names first."""
    run = run_of(
        tmp_path / "run",
        sample("p0", "copy", 0, teacher=COPY), sample("p0", "hint", 0),
        sample("p1", "hint", 1), sample("p1", "copy", 0, teacher=COPY, accepted=False),
        sample("p2", "copy", 0, teacher=COPY), sample("p2", "hint", 1),
        config=CONFIG,
    )  # fmt: skip
    output = tmp_path / "out.jsonl"
    assert main(["export", str(run), "--output", str(output), "--format", "slime"]) == 0
    assert {row["metadata"]["problem_id"]: row["metadata"]["strategy"] for row in read(output)} == {
        "p0": "hint", "p1": "hint", "p2": "copy",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "out.jsonl: 3 problems\n" in said and "2 problems were sampled with other contexts too" in said
    assert read(output)[2]["metadata"]["teacher_prompt"] == COPY


@pytest.mark.parametrize("format", PROBLEMS)
def test_rejected_adds_the_problems_of_which_nothing_was_accepted(tmp_path, format):
    records = [sample("p0", k=1), sample("p1", accepted=False), sample("p0", "copy", 0, teacher=COPY, accepted=False)]
    run = run_of(tmp_path / "run", *records)
    columns = ["problem_id", "strategy", "accepted", "fields"]
    assert export(run, tmp_path / "out.parquet", format, rejected=True, columns=columns).written == 2
    rows = {row["problem_id"]: row for row in read(tmp_path / "out.parquet")}
    assert {name: (row["strategy"], row["accepted"]) for name, row in rows.items()} == {
        "p0": ("hint", True), "p1": ("hint", False),
    }  # fmt: skip
    assert json.loads(rows["p1"]["fields"]) == PROBLEM


@pytest.mark.parametrize("format", PROBLEMS)
def test_another_field_has_the_answer(tmp_path, format, capsys):
    run = run_of(tmp_path / "run", sample("p0", fields={"problem": "3 + 4?", "final": 7, "rate": [0.5, None]}))
    argv = ["export", str(run), "--output", str(tmp_path / "out.parquet"), "--format", format]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "--answer-field: the run's problems have no field 'answer'." in said
    assert "Name the one with the expected answer: final, problem, rate." in said
    assert not list(tmp_path.glob("out*"))
    for field, answer in (("final", "7"), ("rate", "[0.5, null]")):
        assert main([*argv, "--answer-field", field]) == 0
        row = read(tmp_path / "out.parquet")[0]
        given = {"verl": lambda row: row["reward_model"]["ground_truth"], "slime": lambda row: row["label"]}
        assert given.get(format, lambda row: row["privileged_context"])(row) == answer


@pytest.mark.parametrize("format", PROBLEMS)
def test_problems_that_fit_no_row_are_counted(tmp_path, format, capsys):
    records = [
        sample("p0"), sample("p0", k=1, student=[*STUDENT, PREFIX]),  # has a row all the same
        sample("p1", fields={**PROBLEM, "answer": None}), sample("p2", fields={**PROBLEM, "answer": " "}),
        sample("p3", student=[*STUDENT, PREFIX]), sample("p3", k=1, student=[*STUDENT, PREFIX]),
    ]  # fmt: skip
    argv = ["export", str(run_of(tmp_path / "run", *records)), "--output", str(tmp_path / "x.parquet")]
    assert main([*argv, "--format", format]) == 0
    said = capsys.readouterr().out
    assert "x.parquet: 1 problems\n" in said
    assert "left out: 2 problems: there is no expected answer; 1 problems: what the student read does not end" in said
    nothing = run_of(tmp_path / "nothing", *records[4:])
    with pytest.raises(ValueError, match=f"^--format: no problem is left for {format}; 1 problems: what the student"):
        export(nothing, tmp_path / "no.parquet", format)
    assert not list(tmp_path.glob("no.*"))


def test_plain_text(tmp_path):
    run = run_of(tmp_path / "run", sample("p0", student="q: 3 + 4?\na: ", teacher="q: 3 + 4? 7\na: "))
    export(run, tmp_path / "sdft.jsonl", "sdft")
    assert read(tmp_path / "sdft.jsonl")[0] == {"prompt": "q: 3 + 4?\na: ", "privileged_context": "7"}
    export(run, tmp_path / "slime.jsonl", "slime")
    row = read(tmp_path / "slime.jsonl")[0]
    assert row["prompt"] == "q: 3 + 4?\na: " and row["metadata"]["teacher_prompt"] == "q: 3 + 4? 7\na: "
    with pytest.raises(ValueError, match="plain-text contexts, and verl reads chats; use slime or sdft"):
        export(run, tmp_path / "verl.parquet", "verl")
    assert not list(tmp_path.glob("verl*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x.jsonl", "--format", "verl"], "--output: x.jsonl must end in .parquet, which every version of verl reads."),
        (["x.jsonl", "--answer-field", "final"], "--answer-field: is only read with --format verl, sdft, slime."),
    ],
)
def test_wrong_arguments(tmp_path, argv, message, capsys):
    assert main(["export", str(run_of(tmp_path / "run", sample("p0"))), "--output", *argv]) == 2
    assert message in capsys.readouterr().err


def test_no_records(tmp_path):
    run = run_of(tmp_path / "run")
    with pytest.raises(ValueError, match="has no accepted records"):
        export(run, tmp_path / "x.jsonl", "slime")
    with pytest.raises(ValueError, match="has no accepted or rejected records"):
        export(run, tmp_path / "x.jsonl", "slime", rejected=True)


def test_of_a_run(tmp_path, capsys):
    """From the run's file on: its name of the data, its order of the strategies, its own names of the fields."""
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(40, 44)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    strategies = [{"name": name, "teacher": f"{{problem}}\n\n{name}: {{answer}}"} for name in ("tell", "ask")]
    config = {
        "data": {"path": str(tmp_path / "sums.jsonl"), "fields": {"problem": "question"}},
        "contexts": {"student": "{problem}", "strategies": strategies, "select": "cross"},
        "output": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with stub_server() as stub:
        assert main(["run", str(tmp_path / "run.yaml"), "--endpoint", stub.url, "--no-report"]) == 0
    output = tmp_path / "train.parquet"
    assert main(["export", str(tmp_path / "run"), "--output", str(output), "--format", "verl"]) == 0
    assert "4 problems were sampled with other contexts too" in capsys.readouterr().out
    made = sorted(read(output), key=lambda row: row["reward_model"]["ground_truth"])
    for problem, row in zip(rows, made, strict=True):
        assert row["data_source"] == "sums.jsonl"
        assert row["prompt"] == [{"role": "user", "content": problem["question"]}]
        assert row["reward_model"] == {"style": "rule", "ground_truth": problem["answer"]}
        told = f"{problem['question']}\n\ntell: {problem['answer']}"
        assert row["extra_info"]["teacher_prompt"] == [{"role": "user", "content": told}]


def test_the_guide_names_the_templates_and_versions():
    section = GUIDE.split("### Problems for trainers that sample themselves")[1].split("## Best practices")[0]
    assert all(f"`{name}`" in section for name in PROBLEMS) and set(PROBLEMS) <= set(FORMATS)
    import trl

    assert f"TRL {trl.__version__}" in section
    assert re.search(r"verl 0\.10\.0\.dev \(commit 1dda039", section)
    assert re.search(r"slime 0\.3\.1 \(commit 624b824", section)


def tiny(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_tiny_tokenizer_model(tmp_path / "model", seed=0)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


STEP = {
    "max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4,
    "learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
}  # fmt: skip


def test_trl_s_sdft_takes_a_step(tmp_path):
    """With the strategy's words in its template, its teacher reads what the run's teacher did."""
    import torch
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    run = run_of(tmp_path / "run", sample("p0"), sample("p1"), config=CONFIG)
    export(run, tmp_path / "train.parquet", "sdft")
    rows = read(tmp_path / "train.parquet")
    model, tokenizer = tiny(tmp_path)
    trainer = SDFTTrainer(
        model,
        args=SDFTConfig(
            output_dir=str(tmp_path / "trained"), teacher_prompt_template="{prompt}\n\nhint: {privileged_context}",
            teacher_model_kind="live", distillation_topk=8, **STEP,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    read_by_teacher = trainer.teacher_context_builder.select_generation_prompts(
        rows["prompt"], rows["privileged_context"]
    )
    assert read_by_teacher == [HINT, HINT]
    result = trainer.train()
    assert result.global_step == 1 and torch.isfinite(torch.tensor(result.training_loss))


def test_trl_s_sdpo_takes_a_step(tmp_path):
    """Its rewards get the answer; with `include_environment_feedback` its teacher reads it."""
    import torch
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    export(run_of(tmp_path / "run", sample("p0"), sample("p1")), tmp_path / "train.parquet", "sdft")
    model, tokenizer = tiny(tmp_path)
    rewarded, prompts = [], []

    def reward(completions, privileged_context, **_):
        rewarded.extend(privileged_context)
        return [0.0 for _ in completions]

    trainer = SDPOTrainer(
        model,
        reward_funcs=reward,
        args=SDPOConfig(
            output_dir=str(tmp_path / "trained"), include_environment_feedback=True, teacher_model_kind="live",
            reprompt_template="{prompt}{feedback}", feedback_template="\n\nhint: {feedback_raw}", **STEP,
        ),
        train_dataset=read(tmp_path / "train.parquet"),
        processing_class=tokenizer,
    )  # fmt: skip
    tokenize = trainer._tokenize_prompts_untruncated
    trainer._tokenize_prompts_untruncated = lambda read: prompts.extend(read) or tokenize(read)
    result = trainer.train()
    assert result.global_step == 1 and torch.isfinite(torch.tensor(result.training_loss))
    assert rewarded == ["7", "7"] and HINT in prompts
