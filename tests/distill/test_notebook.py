"""docs/notebooks/read_a_run.ipynb, cell by cell, on runs of the stub server."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from stub_server import stub_answer, stub_server

from sglang_optimal.distill.cli import main

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "read_a_run.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(autouse=True)
def no_window():
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(before)


def read(run: Path, monkeypatch) -> dict:
    """The notebook's names after its last cell."""
    monkeypatch.setenv("RUN", str(run))
    names: dict = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    return names


def made(folder: Path, behave=None, answers=("0", "1", "2"), **sections) -> Path:
    """A run over problems with these answers."""
    rows = [{"problem": f"What is {i} + {i}?", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "data": {"path": str(folder / "problems.jsonl")},
        "contexts": {
            "student": "{problem}",
            "strategies": [
                {"name": "copy", "teacher": "{problem} Copy: {answer}"},
                {"name": "hint", "teacher": "{problem} Hint: {answer}"},
            ],
            "select": "cross",
        },
        "sampling": {"n": 2},
        "filters": [{"type": "answer", "match": "numeric"}],
        "output": {"dir": str(folder / "out")},
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    with stub_server() as stub:
        if behave is not None:
            stub.behave = behave
        assert main(["run", str(folder / "run.yaml"), "--endpoint", stub.url, "--no-report"]) == 0
    return folder / "out"


def answered(text: str, **series):
    def behave(body):
        answer = stub_answer(body)
        answer["text"], answer["output_ids"] = text, [1, 2, 3]
        for name, values in list(answer["meta_info"].items()):
            if isinstance(values, list) and all(isinstance(value, float) for value in values):
                answer["meta_info"][name] = [-0.5, -0.5, -0.5]
        answer["meta_info"] |= {"finish_reason": {"type": "stop"}, **series}
        return 200, answer

    return behave


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_numbers(tmp_path, monkeypatch, format):
    """Three problems, two strategies, two samples each; those of the answer 007 are right."""
    student = [-0.25, math.log(1e-4), -0.75]
    behave = answered("It is 7.", student_logprob=student, teacher_logprob=[-0.5, -0.25, -0.5])
    run = made(tmp_path, behave, ("007", "1", "2"), output={"dir": str(tmp_path / "out"), "format": format})
    found = read(run, monkeypatch)
    samples, strategies = found["samples"], found["strategies"]
    assert len(samples) == 12 and int(samples.accepted.sum()) == 4
    assert set(samples.answer) == {"007", "1", "2"}  # no numbers
    assert strategies.loc["copy"].to_dict() == pytest.approx(
        {
            "samples": 6,
            "accepted": 2,
            "problems": 3,
            "covered": 1,
            "tokens drawn": 18,
            "student logprob": np.mean(student),
        }
    )
    assert sorted(found["k_of_n"]["sum"]) == [0, 0, 4]
    assert samples.least.tolist() == pytest.approx([math.log(1e-4)] * 12)
    assert samples.rare.tolist() == [1] * 12 and samples["where"].tolist() == [1] * 12
    assert len(found["leaps"]) == 4 and set(found["leaps"].text) == {"It is 7."}
    assert found["tokens"].pull.tolist()[:3] == pytest.approx([-0.25, -0.25 - math.log(1e-4), 0.25])
    assert found["ess"] == pytest.approx(12.0)


def test_weights_that_differ(tmp_path, monkeypatch):
    """log weights 0 and log 3, six each: (6·1 + 6·3)² / (6·1 + 6·9) = 9.6."""

    def behave(body):
        heavy = "Copy" in json.dumps(body)
        return answered("It is 1.", student_logprob=[math.log(3) - 0.5 if heavy else -0.5, -0.5, -0.5])(body)

    assert read(made(tmp_path, behave), monkeypatch)["ess"] == pytest.approx(9.6, rel=1e-4)


def test_an_impossible_token(tmp_path, monkeypatch):
    """−∞ is stored as null."""
    run = made(tmp_path, answered("It is 0.", student_logprob=[-0.5, -math.inf, -0.5]))
    samples = read(run, monkeypatch)["samples"]
    assert samples.mean_student_logprob.isna().all()
    assert samples.least.tolist() == [-math.inf] * 12 and samples["where"].tolist() == [1] * 12


@pytest.mark.parametrize("answers", [("1000", "1001"), ("0", "1", "2")], ids=["none accepted", "some"])
@pytest.mark.parametrize("output", [{"series": False}, {}], ids=["alpha alone", "series"])
def test_other_runs(tmp_path, monkeypatch, answers, output):
    run = made(tmp_path, answers=answers, output={"dir": str(tmp_path / "out"), **output})
    found = read(run, monkeypatch)
    assert len(found["samples"]) == 4 * len(answers)
    if len(answers) == 2:
        assert not found["samples"].accepted.any() and found["leaps"].empty
    assert (len(found["tokens"]) == 0) == (output == {"series": False})


def test_everything_accepted_in_two_parts(tmp_path, monkeypatch):
    run = made(tmp_path, filters=[], output={"dir": str(tmp_path / "out"), "shard_records": 5})
    assert len(list((run / "data").glob("*.parquet"))) > 1
    assert read(run, monkeypatch)["samples"].accepted.all()


def test_no_run(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no finished shards; is it a run's folder"):
        read(tmp_path, monkeypatch)


def test_the_file_itself():
    """Small, without results or paths, and of the format that Jupyter reads."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    whole = json.loads(text)
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5) and len(text) < 20_000
    assert "/home" not in text and "/tmp" not in text and "/work" not in text
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
