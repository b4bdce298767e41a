"""Preference pairs and labels of accepted and rejected samples, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_export import read
from test_export_check import sampled, tokenizer_of  # noqa: F401 - a fixture

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.export import export as checked_export
from sglang_optimal.distill.export_pairs import DUPLICATE, NO_TEXT, ONE_SIDED, OTHER_FILTER
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.store import RecordStore

STUDENT = [{"role": "user", "content": "3 + 4?"}]
OTHER = [{"role": "user", "content": "three and four?"}]
FILTERS = [{"type": "finish"}, {"type": "answer", "name": "right"}, {"type": "deduplicate", "name": "new"}]


def export(*arguments, **more):
    """These records' ids are made up; test_both_sides_are_compared has real ones."""
    return checked_export(*arguments, check=False, **more)


def sample(problem, k, text, by=None, *, ids=(20, 21), student=STUDENT, weight=0.0, strategy="s", **more) -> Record:
    """``weight``: its log_weight_student. ``by``: the filter that rejected it."""
    return Record(
        f"{problem}/{strategy}/{k}", problem, strategy, k, {}, student, student, text, list(ids), "stop",
        accepted=by is None, rejected_by=by, student_prompt_ids=[1, 2], student_logprob=[weight, 0.0][: len(ids)],
        mixture_logprob=[0.0, 0.0][: len(ids)], **more,
    )  # fmt: skip


def run_of(folder, *records, filters=FILTERS, **store) -> Path:
    made = RecordStore(folder, **store)
    for record in records:
        made.append(record)
    made.finalize()
    made.write_json(made.manifest_path, {"state": "complete", "config": {"filters": filters}})
    made.close()
    return folder


def turn(text):
    return [{"role": "assistant", "content": text}]


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in read(path)]


@pytest.mark.parametrize("stored", ["parquet", "jsonl"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_pair_and_labels(tmp_path, suffix, stored):
    variables = {"student_chat_template_kwargs": {"enable_thinking": False}}
    run = run_of(
        tmp_path / "run",
        sample("p", 0, "it is 8 – né", "right", sampling=variables), sample("p", 1, "it is 7", sampling=variables),
        sample("q", 0, "sì", sampling=variables), format=stored,
    )  # fmt: skip
    output = tmp_path / f"out.{suffix}"
    done = export(run, output, "trl-dpo", columns=["id", "rejected_by", "log_weight_student"])
    assert (done.written, done.checked, done.left_out) == (1, False, {ONE_SIDED: 1})
    assert read(output)[0] == {
        "prompt": STUDENT, "chosen": turn("it is 7"), "rejected": turn("it is 8 – né"),
        "chat_template_kwargs": {"enable_thinking": False}, "chosen_id": "p/s/1", "rejected_id": "p/s/0",
        "chosen_rejected_by": None, "rejected_rejected_by": "right",
        "chosen_log_weight_student": 0.0, "rejected_log_weight_student": 0.0,
    }  # fmt: skip
    assert export(run, output, "trl-kto", columns=["id"]).written == 3
    rows = [(row["id"], row["completion"], row["label"]) for row in read(output)]
    assert rows == [
        ("p/s/0", turn("it is 8 – né"), False), ("q/s/0", turn("sì"), True), ("p/s/1", turn("it is 7"), True),
    ]  # fmt: skip
    assert all(row["prompt"] == STUDENT for row in read(output))


def test_labels_of_a_problem_are_apart(tmp_path):
    """TRL takes the completion of the row before as one of another prompt."""
    records = [sample(problem, k, f"{problem} {k}") for problem in "abc" for k in range(2)]
    run = run_of(tmp_path / "run", *records, sample("c", 2, "c 2"))
    export(run, tmp_path / "out.jsonl", "kto")
    said = [row["completion"][0]["content"] for row in read(tmp_path / "out.jsonl")]
    assert said == ["a 0", "b 0", "c 0", "a 1", "b 1", "c 1", "c 2"]


WEIGHTS = [
    sample("p", 0, "A", weight=-3.0, ids=(1, 2)), sample("p", 1, "B", weight=-1.0, ids=(5, 6)),
    sample("p", 2, "x", "right", weight=-4.0, ids=(5, 2)), sample("p", 3, "y", "right", weight=-0.5, ids=(9, 2)),
    sample("p", 4, "z", "right", weight=-float("inf"), ids=(1, 2, 3)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ["Ax"]),
        ({"pick": "order", "pairs": 2}, ["Ax", "By"]),
        ({"pairs": 3}, ["Ax", "By", "Az"]),  # z is in no pair yet
        ({"pick": "weight"}, ["By"]),  # −1.5
        ({"pick": "weight", "pairs": 3}, ["By", "Ax", "Az"]),  # −1.5; −7 of those in none; then z again
        ({"pick": "prefix"}, ["Az"]),  # both tokens of A
        ({"pick": "prefix", "pairs": 2}, ["Az", "Bx"]),  # one token of B
        ({"pairs": "all"}, ["Ax", "Ay", "Az", "Bx", "By", "Bz"]),
        ({"pairs": "all", "pick": "weight"}, ["By", "Ay", "Bx", "Ax", "Az", "Bz"]),
        ({"pairs": 99}, ["Ax", "By", "Az", "Bx", "Ay", "Bz"]),
    ],
)
def test_which_pairs(tmp_path, more, expected):
    run = run_of(tmp_path / "run", *reversed(WEIGHTS))
    export(run, tmp_path / "out.jsonl", "trl-dpo", **more)
    assert [one + other for one, other in pairs(tmp_path / "out.jsonl")] == expected
    flags = [str(part) for name, value in more.items() for part in (f"--{name}", value)]
    output = tmp_path / "cli.jsonl"
    assert main(["export", str(run), "--output", str(output), "--format", "dpo", "--no-check", *flags]) == 0
    assert output.read_text() == (tmp_path / "out.jsonl").read_text()


def test_only_of_one_context(tmp_path):
    """Not of another prompt, of the same prompt with another template, or of another problem with the same prompt."""
    run = run_of(
        tmp_path / "run",
        sample("p", 0, "yes"), sample("p", 1, "no", "right", student=OTHER),
        sample("p", 2, "off", "right", sampling={"student_chat_template_kwargs": {"enable_thinking": False}}),
        sample("q", 0, "no", "right"), sample("r", 0, "plain", "right", student="3 + 4?"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="nothing is left for trl-dpo; 3 problems: no accepted and rejected sample of"):
        export(run, tmp_path / "out.jsonl", "trl-dpo")
    assert not list(tmp_path.glob("out*"))
    more = run_of(
        tmp_path / "more", sample("p", 0, "yes", strategy="a"), sample("p", 0, "no", "right", strategy="b"),
        sample("p", 1, "other", student=OTHER), sample("p", 1, "wrong", "right", student=OTHER, strategy="b"),
    )  # fmt: skip
    export(more, tmp_path / "out.jsonl", "trl-dpo", pairs="all")
    assert pairs(tmp_path / "out.jsonl") == [("yes", "no"), ("other", "wrong")]
    export(more, tmp_path / "one.jsonl", "trl-dpo")
    assert pairs(tmp_path / "one.jsonl") == [("yes", "no")]  # one of the problem, not of each context


def test_what_says_nothing_of_right_and_wrong(tmp_path, capsys):
    """Refusals, half characters, repeats; a text that was accepted once is not wrong elsewhere."""
    run = run_of(
        tmp_path / "run",
        sample("p", 0, "7"), sample("p", 1, "", "server", ids=()), sample("p", 2, "\ufffd", "characters"),
        sample("p", 3, "7", "new"), sample("p", 4, "7 ", "new"), sample("p", 5, "7", "right"),
        sample("p", 6, "8", "right"), sample("p", 7, "8", "right"), sample("p", 8, "7"), sample("p", 9, "9", "finish"),
    )  # fmt: skip
    argv = ["export", str(run), "--output", str(tmp_path / "out.jsonl"), "--no-check", "--format"]
    assert main([*argv, "trl-dpo", "--pairs", "all"]) == 0
    assert pairs(tmp_path / "out.jsonl") == [("7", "8"), ("7", "9")]
    said = capsys.readouterr().out
    assert "out.jsonl: 2 pairs\n" in said
    assert "2 records: nothing was sampled" in said and "5 records: the student has another sample of the same" in said
    done = export(run, tmp_path / "labels.jsonl", "trl-kto")
    assert done.left_out == {NO_TEXT: 2, DUPLICATE: 5}
    rows = [(row["completion"][0]["content"], row["label"]) for row in read(tmp_path / "labels.jsonl")]
    assert rows == [("7", True), ("8", False), ("9", False)]
    only = export(run, tmp_path / "only.jsonl", "trl-dpo", pairs="all", rejected_by=["finish"])
    assert pairs(tmp_path / "only.jsonl") == [("7", "9")] and only.left_out[OTHER_FILTER] == 3


def test_runs_of_older_versions_and_of_two_machines(tmp_path):
    """Without settings in run.json, prompt ids or a weight."""
    old = run_of(
        tmp_path / "old", sample("p", 0, "7"), sample("p", 1, "8", "right"), sample("p", 2, "7", "deduplicate")
    )
    (old / "run.json").write_text('{"state": "complete"}')
    for shard in old.glob("*/*.parquet"):
        import pyarrow.parquet as parquet

        table = parquet.read_table(shard)
        parquet.write_table(table.drop_columns(["student_prompt_ids", "teacher_prompt_ids"]), shard)
    assert export(old, tmp_path / "out.jsonl", "trl-dpo", pick="weight", pairs="all").left_out == {DUPLICATE: 1}
    assert pairs(tmp_path / "out.jsonl") == [("7", "8")]
    for i, text in enumerate("ab"):
        run_of(tmp_path / "two", sample(text, 0, text), sample(text, 1, f"not {text}", "right"), shard=(i, 2))
    export(tmp_path / "two", tmp_path / "two.jsonl", "trl-dpo", rejected_by=["right"])
    assert pairs(tmp_path / "two.jsonl") == [("a", "not a"), ("b", "not b")]


def test_nothing_there(tmp_path):
    run = run_of(tmp_path / "run")
    for format in ("trl-dpo", "trl-kto"):
        with pytest.raises(ValueError, match="has no accepted or rejected records"):
            export(run, tmp_path / "out.jsonl", format)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trl-dpo", "--rejected"], "--rejected: trl-dpo reads accepted and rejected records as it is."),
        (["trl-sft", "--pairs", "2"], "--pairs: is only read with --format trl-dpo."),
        (["trl-kto", "--pick", "weight"], "--pick: is only read with --format trl-dpo."),
        (["trl-dpo", "--pairs", "0"], "--pairs: must be a positive number or all, got 0."),
        (["sft", "--rejected-by", "right"], "--rejected-by: is only read with --format trl-dpo, trl-kto."),
        (
            ["trl-dpo", "--rejected-by", "rihgt"],
            "--rejected-by: the run has no filter 'rihgt'; it has finish, new, rig",
        ),
        (["trl-dpo", "--answer-field", "x"], "--answer-field: is only read with"),
    ],
)
def test_flags_that_are_not_read(tmp_path, argv, message, capsys):
    run = run_of(tmp_path / "run", sample("p", 0, "7"), sample("p", 1, "8", "right"))
    assert main(["export", str(run), "--output", str(tmp_path / "x.jsonl"), "--no-check", "--format", *argv]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("argv", [["--pairs", "many"], ["--pick", "best"]])
def test_flags_of_no_meaning(tmp_path, argv):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path), "--output", "x.jsonl", "--format", "trl-dpo", *argv])


def test_both_sides_are_compared(tmp_path, tokenizer_of, capsys):  # noqa: F811
    """A rejected sample that was cut would get an end that the model did not write."""
    folder = tokenizer_of("smollm2")
    made = [
        sampled(folder, STUDENT, "It is 7."),
        sampled(folder, STUDENT, "It is 8.", accepted=False, rejected_by="right"),
        sampled(folder, STUDENT, "It is", finish="length", ended=False, accepted=False, rejected_by="finish"),
    ]
    for k, record in enumerate(made):
        record.id, record.sample_index = f"p/s/{k}", k
    run = run_of(tmp_path / "run", *made)
    argv = ["export", str(run), "--output", str(tmp_path / "out.jsonl"), "--format", "trl-dpo", "--pairs", "all"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "1 pairs, compared with what was sampled" in said and "left out: 1 records: the trainer would add" in said
    assert pairs(tmp_path / "out.jsonl") == [("It is 7.", "It is 8.")]
    assert main([*argv, "--on-mismatch", "keep"]) == 0
    assert pairs(tmp_path / "out.jsonl") == [("It is 7.", "It is 8."), ("It is 7.", "It is")]
    with pytest.raises(ValueError, match="record p/s/0: the trainer would read another prompt"):
        checked_export(run, tmp_path / "no.jsonl", "trl-dpo", tokenizer=str(tokenizer_of("phi3")))
    cut = run_of(tmp_path / "cut", made[0], made[2])
    with pytest.raises(ValueError, match="no record is left|nothing is left"):
        checked_export(cut, tmp_path / "no.jsonl", "trl-dpo")


def test_the_file_is_json_of_trl_s_own_form(tmp_path):
    export(run_of(tmp_path / "run", *WEIGHTS), tmp_path / "out.jsonl", "trl-dpo")
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    from trl.data_utils import is_conversational

    assert is_conversational(row) and set(row) == {"prompt", "chosen", "rejected"}
