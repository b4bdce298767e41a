"""Per-token weights and masks, aligned to the token ids, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_export import read
from test_export_pairs import run_of

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.export import export
from sglang_optimal.distill.records import Record

READ = [{"role": "user", "content": "3 + 4?"}]
LOGS = {
    "student_logprob": [math.log(0.5), math.log(0.001), -math.inf],
    "teacher_logprob": [math.log(0.25), -math.inf, math.log(0.8)],
    "mixture_logprob": [math.log(0.25), math.log(0.1), math.log(0.4)],
}


def record(name="p", sampling=None, **more) -> Record:
    """Three tokens, the last of which is the end."""
    given = {"temperature": 1.0} if sampling is None else sampling
    return Record(
        f"{name}/s/0", name, "s", 0, {}, READ, READ, "it is 7", [20, 21, 2], "stop", student_prompt_ids=[1, 5],
        sampling=given, **{**LOGS, **more},
    )  # fmt: skip


def exported(tmp_path, format, *records, suffix="jsonl", **more):
    output = tmp_path / f"out.{suffix}"
    export(run_of(tmp_path / "run", *(records or [record()])), output, format, **more)
    return read(output)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("more", "weights"),
    [
        ({"weights": "student"}, [2.0, 0.01, 0.0]),
        ({"weights": "teacher"}, [1.0, 0.0, 2.0]),
        ({"weights": "student", "max_weight": 1.5}, [1.5, 0.01, 0.0]),
    ],
)
def test_weights(tmp_path, suffix, more, weights):
    (row,) = exported(tmp_path, "records", suffix=suffix, **more)
    assert row["weights"] == pytest.approx(weights, rel=1e-5) and len(row["weights"]) == len(row["token_ids"])
    assert row["weights"][0] == weights[0] or "max_weight" not in more
    (row,) = exported(tmp_path / "tokens", "trl-tokens", suffix=suffix, **more)
    assert row["weights"] == pytest.approx([0.0, 0.0, *weights], rel=1e-5)
    assert row["labels"] == [-100, -100, 20, 21, 2] and set(row) == {"input_ids", "labels", "weights"}


def test_weights_by_what_the_token_was_drawn_with(tmp_path):
    """After top-p it is behaviour_logprob; without it nobody knows."""
    cut = {"temperature": 1.0, "top_p": 0.9}
    drawn = record(sampling=cut, more_series={"behaviour_logprob": [0.0, math.log(0.5), math.log(0.1)]})
    (row,) = exported(tmp_path, "trl-tokens", drawn, weights="student")
    assert row["weights"] == pytest.approx([0, 0, 0.5, 0.002, 0.0], rel=1e-5) and "behaviour_logprob" not in row
    with pytest.raises(ValueError, match="^--weights: behaviour: record p/s/0 was drawn with top_p 0.9, so that"):
        exported(tmp_path / "cut", "trl-tokens", record(sampling=cut), weights="student")


@pytest.mark.parametrize(
    ("floor", "mask"), [(0.0005, [1, 1, 0]), (0.001, [1, 1, 0]), (0.01, [1, 0, 0]), (0.5, [1, 0, 0])]
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_masks(tmp_path, floor, mask, suffix):
    """A token that the student finds impossible is masked; one at the floor is not."""
    (row,) = exported(tmp_path, "records", suffix=suffix, mask_below=floor)
    assert row["mask"] == mask
    (row,) = exported(tmp_path / "tokens", "trl-tokens", suffix=suffix, mask_below=floor)
    assert row["mask"] == [0, 0, *mask]
    ids = [20, 21, 2]
    assert row["labels"] == [-100, -100, *(token if kept else -100 for token, kept in zip(ids, mask, strict=True))]


def test_a_record_of_which_no_token_is_left(tmp_path, capsys):
    run = run_of(tmp_path / "run", record("p"), record("q", student_logprob=[math.log(0.9)] * 3))
    argv = ["export", str(run), "--format", "trl-tokens", "--output", str(tmp_path / "out.jsonl"), "--mask-below"]
    assert main([*argv, "0.6"]) == 0
    assert "left out: 1 records: no token is left by --mask-below" in capsys.readouterr().out
    assert len(read(tmp_path / "out.jsonl")) == 1
    assert main([*argv, "1"]) == 2
    assert "nothing is left for trl-tokens; 2 records: no token" in capsys.readouterr().err


def test_weights_that_no_float32_holds(tmp_path):
    far = record(mixture_logprob=[-100.0, -1.0, -1.0])
    with pytest.raises(ValueError, match="^--max-weight: is needed; record p/s/0"):
        exported(tmp_path, "records", far, weights="student")
    (row,) = exported(tmp_path / "cut", "records", far, weights="student", max_weight=10.0)
    assert row["weights"] == pytest.approx([10.0, 0.001 * math.e, 0.0], rel=1e-5)
    never = record(mixture_logprob=[-math.inf, -1.0, -1.0])
    with pytest.raises(ValueError, match="record p/s/0 has a token that was drawn with probability 0"):
        exported(tmp_path / "never", "records", never, weights="student")


def test_a_run_without_series(tmp_path):
    run = run_of(tmp_path / "run", record(), series=False)
    for more, flag in (({"weights": "student"}, "--weights"), ({"mask_below": 0.1}, "--mask-below")):
        with pytest.raises(ValueError, match=f"^{flag}: record p/s/0 has 0 values of student_logprob for 3 tokens"):
            export(run, tmp_path / "out.jsonl", "records", **more)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sft", "--weights", "student"], "--weights: is only read with --format trl-tokens, records, which have the"),
        (["trl-dpo", "--mask-below", "0.1"], "--mask-below: is only read with --format trl-tokens, records"),
        (["records", "--max-weight", "2"], "--max-weight: is only read with --weights."),
        (["records", "--weights", "student", "--max-weight", "0"], "--max-weight: must be a positive number, got 0.0."),
        (
            ["records", "--weights", "student", "--max-weight", "nan"],
            "--max-weight: must be a positive number, got nan",
        ),
        (["records", "--mask-below", "0"], "--mask-below: must be a probability, above 0 and at most 1, got 0.0."),
        (["records", "--mask-below", "nan"], "--mask-below: must be a probability"),
    ],
)
def test_wrong_flags(tmp_path, argv, message, capsys):
    run = run_of(tmp_path / "run", record())
    assert main(["export", str(run), "--output", str(tmp_path / "x.jsonl"), "--format", *argv]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()


def test_most_likely_tokens_beside_the_ids(tmp_path):
    import numpy as np

    arrays = {
        "ids": np.array([[20, 3]] * 3, np.int32), "teacher_logprobs": np.zeros((3, 2), np.float32),
        "student_logprobs": np.zeros((3, 2), np.float32), "mixture_logprobs": np.zeros((3, 2), np.float32),
        **{f"{side}_tail": np.zeros(3, np.float32) for side in ("teacher", "student", "mixture")},
    }  # fmt: skip
    columns = ["top_k_teacher_ids", "top_k_teacher_teacher_logprobs", "top_k_teacher_teacher_tail"]
    (row,) = exported(
        tmp_path, "trl-tokens", record(top_k={"teacher": arrays}), columns=columns, suffix="parquet", mask_below=0.01
    )
    assert row["top_k_teacher_ids"] == [[20, 3]] * 3 and row["mask"] == [0, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def guide():
    return (Path(__file__).parents[2] / "docs" / "distillation_guide.md").read_text()


def test_trl_takes_no_loss_of_what_is_masked_and_the_guide_s_trainer_reads_weights(tmp_path, guide):
    import datasets
    import torch
    from tiny_models import build_tiny_tokenizer_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = run_of(tmp_path / "run", record("p"), record("q", student_logprob=[math.log(0.5)] * 3))
    export(run, tmp_path / "train.parquet", "trl-tokens", weights="student", max_weight=3.0, mask_below=0.01)
    folder = build_tiny_tokenizer_model(tmp_path / "model", seed=0, hidden_size=32, num_layers=1)
    code = guide.split("```python weighted\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    from trl import SFTConfig

    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"))["train"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trainer = names["WeightedSFTTrainer"](
        model,
        args=SFTConfig(
            str(tmp_path / "trained"), max_steps=1, per_device_train_batch_size=2, learning_rate=0.0,
            report_to="none", use_cpu=True, bf16=False, save_strategy="no", remove_unused_columns=False,
        ),
        train_dataset=rows, processing_class=tokenizer, data_collator=names["collate"],
    )  # fmt: skip
    loss = trainer.train().training_loss
    with torch.no_grad():
        nll = -model(torch.tensor([[1, 5, 20, 21, 2]])).logits[0].log_softmax(-1)
    tokens = nll[1, 20], nll[2, 21], nll[3, 2]
    # p: 0.5/0.25, the others are masked. q: 2, 3 (5 is cut), 0.5/0.4.
    expected = (2 * tokens[0] + 2 * tokens[0] + 3 * tokens[1] + 1.25 * tokens[2]) / 4
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert json.loads(json.dumps(rows[0]["labels"])) in ([-100, -100, 20, -100, -100], [-100, -100, 20, 21, 2])
