"""A run's records for trainers; TRL takes a step on them."""

from __future__ import annotations

import json

import datasets
import pytest
from tiny_models import build_tiny_tokenizer_model, smollm2_tokenizer_dir

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.export import FORMATS
from sglang_optimal.distill.export import export as checked_export
from sglang_optimal.distill.records import COLUMNS, Record
from sglang_optimal.distill.store import RecordStore
from sglang_optimal.names import SERIES

STUDENT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is 3 + 4?"}]
TEACHER = [{"role": "user", "content": "what is 3 + 4? it is 7"}]
PREFIX = {"role": "assistant", "content": "well, "}


def export(*arguments, **more) -> int:
    """These records' ids are made up; test_export_check.py compares real ones."""
    return checked_export(*arguments, check=False, **more).written


def make_run(folder, *, student=STUDENT, teacher=TEACHER, count=4, prompt_ids=True, sampling=None):
    store = RecordStore(folder)
    for i in range(count):
        accepted = i != 1
        store.append(
            Record(
                id=f"p{i}/default/0", problem_id=f"p{i}", strategy="default", sample_index=0,
                fields={"problem": "what is 3 + 4?", "answer": "7"}, student_context=student, teacher_context=teacher,
                text=f"it is {i}", token_ids=[20, 21, 22], finish_reason="stop", accepted=accepted,
                student_prompt_ids=[1, 4, 5] if prompt_ids else [], sampling=sampling or {},
                rejected_by=None if accepted else "answer", reject_reason=None if accepted else "wrong",
                **{name: [0.5, 0.25, -1.0] for name in SERIES},
            )
        )  # fmt: skip
    store.finalize()
    store.write_json(store.manifest_path, {"state": "complete"})
    store.close()
    return folder


def read(path):
    return datasets.load_dataset("json" if path.suffix == ".jsonl" else "parquet", data_files=str(path))["train"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("format", "first"),
    [
        ("sft", {"messages": [*STUDENT, {"role": "assistant", "content": "it is 0"}]}),
        ("trl-sft", {"prompt": STUDENT, "completion": [{"role": "assistant", "content": "it is 0"}]}),
        (
            "trl-gkd",
            {
                "messages": [*STUDENT, {"role": "assistant", "content": "it is 0"}],
                "input_ids": [1, 4, 5, 20, 21, 22], "completion_mask": [0, 0, 0, 1, 1, 1],
            },
        ),
        ("trl-tokens", {"input_ids": [1, 4, 5, 20, 21, 22], "labels": [-100, -100, -100, 20, 21, 22]}),
    ],
)  # fmt: skip
def test_chats(tmp_path, format, first, suffix):
    output = tmp_path / f"out.{suffix}"
    assert export(make_run(tmp_path / "run"), output, format) == 3
    rows = read(output)
    assert rows[0] == first and len(rows) == 3


def test_a_prefix_is_part_of_the_answer(tmp_path):
    run = make_run(tmp_path / "run", student=[*STUDENT, PREFIX])
    export(run, tmp_path / "out.jsonl", "sft")
    assert read(tmp_path / "out.jsonl")[0]["messages"] == [
        *STUDENT, {"role": "assistant", "content": "well, it is 0"},
    ]  # fmt: skip
    export(run, tmp_path / "prompts.jsonl", "trl-sft")
    row = read(tmp_path / "prompts.jsonl")[0]
    assert row["prompt"] == STUDENT
    assert row["completion"] == [{"role": "assistant", "content": "well, it is 0"}]


@pytest.mark.parametrize("format", ["sft", "trl-sft"])
def test_trl_renders_what_the_student_read(tmp_path, format):
    """With the template's variables, and a prefix within the assistant's turn."""
    from transformers import AutoTokenizer
    from trl.data_utils import apply_chat_template

    tokenizer = AutoTokenizer.from_pretrained(smollm2_tokenizer_dir())
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if not thinking %}!{% endif %}"
    )
    run = make_run(
        tmp_path / "run", student=[*STUDENT, PREFIX], sampling={"student_chat_template_kwargs": {"thinking": True}}
    )
    export(run, tmp_path / "out.jsonl", format)
    (first, *_) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first["chat_template_kwargs"] == {"thinking": True}
    rendered = apply_chat_template(first, tokenizer)
    whole = rendered.get("text") or rendered["prompt"] + rendered["completion"]
    assert whole == "<|system|>be kind<|user|>what is 3 + 4?<|assistant|>well, it is 0<end>"
    export(run, tmp_path / "text.jsonl", "text", tokenizer=str(saved(tokenizer, tmp_path / "tokenizer")))
    assert read(tmp_path / "text.jsonl")[0]["text"] == whole


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_records_of_an_older_version_have_no_prompt_ids(tmp_path):
    run = make_run(tmp_path / "run", prompt_ids=False)
    for format in ("trl-tokens", "trl-gkd"):
        with pytest.raises(ValueError, match=f"{format} needs the records' student_prompt_ids"):
            export(run, tmp_path / "out.jsonl", format)


def test_plain_text(tmp_path):
    run = make_run(tmp_path / "run", student="q: 3 + 4?\na: ", teacher="t")
    export(run, tmp_path / "out.jsonl", "text")
    assert read(tmp_path / "out.jsonl")[0] == {"text": "q: 3 + 4?\na: it is 0"}
    export(run, tmp_path / "pairs.parquet", "trl-sft")
    assert read(tmp_path / "pairs.parquet")[0] == {"prompt": "q: 3 + 4?\na: ", "completion": "it is 0"}
    with pytest.raises(ValueError, match="the run has plain-text contexts; use trl-sft or text"):
        export(run, tmp_path / "chat.jsonl", "sft")
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "chat.jsonl").exists()


def test_chats_as_text(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="--tokenizer: is needed"):
        export(run, tmp_path / "out.jsonl", "text")
    model = build_tiny_tokenizer_model(tmp_path / "model", seed=0)
    export(run, tmp_path / "out.jsonl", "text", tokenizer=str(model))
    assert read(tmp_path / "out.jsonl")[0]["text"] == "<bos><sys>be kind<usr>what is 3 + 4?<ast>it is 0<eos>"


def test_all_columns_and_more_columns(tmp_path):
    run = make_run(tmp_path / "run")
    export(run, tmp_path / "all.parquet", "records")
    assert read(tmp_path / "all.parquet").column_names == list(COLUMNS)
    columns = ["id", "log_weight_student", "student_logprob", "rejected_by"]
    export(run, tmp_path / "some.parquet", "sft", columns=columns)
    row = read(tmp_path / "some.parquet")[0]
    assert {name: row[name] for name in columns} == dict(
        zip(columns, ("p0/default/0", 0.0, [0.5, 0.25, -1.0], None), strict=True)
    )


def test_rejected(tmp_path):
    assert export(make_run(tmp_path / "run"), tmp_path / "no.jsonl", "sft", rejected=True) == 1
    assert read(tmp_path / "no.jsonl")[0]["messages"][-1]["content"] == "it is 1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "x.jsonl", "--format", "trl"], "--format: unknown key 'trl'. Did you mean 'trl-sft'"),
        (["--output", "x.csv"], "--output: x.csv must end in .jsonl or .parquet."),
        (["--output", "x.jsonl", "--columns", "alhpa"], "--columns: unknown key 'alhpa'. Did you mean 'alpha'?"),
    ],
)
def test_wrong_arguments(tmp_path, argv, message, capsys):
    assert main(["export", str(make_run(tmp_path / "run")), *argv]) == 2
    assert message in capsys.readouterr().err


def test_no_run(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "has no run in it" in capsys.readouterr().err
    empty = make_run(tmp_path / "run", count=0)
    assert main(["export", str(empty), "--output", str(tmp_path / "x.jsonl"), "--no-check"]) == 2
    assert "has no accepted records" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["export", str(run), "--output", str(tmp_path / "x.jsonl"), "--columns", "id", "--no-check"]) == 0
    assert "x.jsonl: 3 records" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])["id"] == "p0/default/0"
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in FORMATS)


@pytest.mark.parametrize("format", ["sft", "trl-sft", "trl-tokens"])
def test_trl_takes_a_step(tmp_path, format):
    """Only the sample is trained on; its loss is what the model's own log-probabilities say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    export(make_run(tmp_path / "run"), tmp_path / "train.parquet", format)
    folder = build_tiny_tokenizer_model(tmp_path / "model", seed=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path / "trained"), max_steps=1, per_device_train_batch_size=3, learning_rate=1e-3,
            report_to="none", use_cpu=True, bf16=False, save_strategy="no",
        ),
        train_dataset=read(tmp_path / "train.parquet"),
        processing_class=tokenizer,
    )  # fmt: skip
    result = trainer.train()
    assert result.global_step == 1 and torch.isfinite(torch.tensor(result.training_loss))
    assert any(not torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    if format == "trl-sft":
        batch = next(iter(trainer.get_train_dataloader()))
        kept = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
        assert all(text.startswith("it is ") for text in kept), kept
    if format == "trl-tokens":
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["input_ids"].tolist() == [[1, 4, 5, 20, 21, 22]] * 3
        assert batch["labels"].tolist() == [[-100, -100, -100, 20, 21, 22]] * 3
