"""Problems from files of every kind."""

from __future__ import annotations

import json

import datasets
import pytest

from sglang_optimal.distill.config import Data
from sglang_optimal.distill.problems import load_problems

ROWS = [
    {"key": "a", "question": "What is 3 + 4?", "answer": 7, "level": {"grade": 1}},
    {"key": "b", "question": 'Say "hi"\nto Zoë', "answer": 8, "level": {"grade": 2}},
    {"key": "c", "question": "What is 3 + 4?", "answer": 7, "level": {"grade": 1}},
]
FLAT = [{k: v for k, v in row.items() if k != "level"} for row in ROWS]


@pytest.fixture
def written(tmp_path):
    dataset = datasets.Dataset.from_list(FLAT)

    def write(kind: str):
        path = tmp_path / f"problems.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in FLAT))
        elif kind == "json":
            path.write_text(json.dumps(FLAT))
        elif kind == "csv":
            dataset.to_csv(path)
        elif kind == "parquet":
            dataset.to_parquet(path)
        else:
            path = tmp_path / "folder"
            path.mkdir()
            dataset.to_parquet(path / "train.parquet")
        return path

    return write


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_every_kind(written, kind):
    problems = load_problems(Data(path=str(written(kind)), fields={"id": "key", "problem": "question"}))
    assert [p.id for p in problems] == ["a", "b", "c"]
    assert problems[1].fields == {"id": "b", "problem": 'Say "hi"\nto Zoë', "answer": 8}


def test_nested_columns(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert load_problems(Data(path=str(path)))[1].fields["level"] == {"grade": 2}


def test_made_ids(written, tmp_path):
    data = Data(path=str(written("jsonl")), fields={"problem": "question"})
    ids = [p.id for p in load_problems(data)]
    assert len(set(ids)) == 3
    same = tmp_path / "same.jsonl"
    same.write_text('{"q": 1}\n{"q": 2}\n{"q": 1}\n')
    first, second, third = (p.id for p in load_problems(Data(path=str(same))))
    assert third == f"{first}-2" and second not in (first, third)
    same.write_text('{"q": 0}\n{"q": 1}\n')  # ids are of the content, not the place
    assert load_problems(Data(path=str(same)))[1].id == first


def test_limit_and_split(written):
    path = str(written("jsonl"))
    assert len(load_problems(Data(path=path, limit=2))) == 2
    assert len(load_problems(Data(path=path, limit=200))) == 3
    assert len(load_problems(Data(path=path, split="train[1:]"))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.path: is required"),
        ({"path": "nowhere.jsonl"}, "data.path: no such file: nowhere.jsonl"),
        ({"path": "/nowhere/at/all"}, "data.path: no such file"),
        ({"path": "PATH", "split": "test"}, "data.path: cannot read"),
        ({"path": "PATH", "fields": {"problem": "qestion"}}, "data.fields.problem: PATH: no column 'qestion'. Did you"),
        ({"path": "PATH", "fields": {"id": "answer"}}, "data.fields.id: the id '7' occurs twice"),
    ],
)
def test_wrong_data(written, settings, message):
    path = str(written("jsonl"))
    settings = {k: path if v == "PATH" else v for k, v in settings.items()}
    with pytest.raises(ValueError) as caught:
        load_problems(Data(**settings))
    assert str(caught.value).startswith(message.replace("PATH", path))


@pytest.mark.parametrize("content", ["", "{", "[1, 2", "no json"])
def test_unreadable(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="data.path"):
        load_problems(Data(path=str(path)))


def test_unknown_suffix(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("x")
    with pytest.raises(ValueError, match="is none of .jsonl, .json, .csv, .parquet"):
        load_problems(Data(path=str(path)))
