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
    assert problems[1].fields == {"id": "b", "problem": 'Say "hi"\nto Zoë', "answer": "8" if kind == "csv" else 8}


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
    with pytest.raises(ValueError, match="is none of .jsonl, .json, .csv, .tsv, .parquet"):
        load_problems(Data(path=str(path)))


def values(tmp_path, name: str, content: str | bytes, **settings) -> list:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [problem.fields["a"] for problem in load_problems(Data(path=str(path), **settings))]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.csv", "a,b\n007,1\nNone,1\nNA,1\nnull,1\nnan,1\n42,\n1945-05-08,1\n", "007 None NA null nan 42 1945-05-08"),
        ("x.csv", "a\r\n1e3\r\nTrue\r\n", "1e3 True"),
        ("X.TSV", "a\tb\n1,5\tx\n", "1,5"),
        ("x.JSONL", '{"a": "1945-05-08"}\n{"a": 0.10}\n{"a": 1e3}\n{"a": 42}\n', "1945-05-08 0.10 1e3 42"),
        ("x.jsonl", f'{{"a": {2**100}}}\n', str(2**100)),
        ("x.jsonl", '{"a": "x\u2028y"}\r\n', "x\u2028y"),
        ("x.jsonl", b"\xef\xbb\xbf" + '{"a": "é"}\n'.encode(), "é"),
        ("x.jsonl", '{"a": "é"}\n'.encode("utf-16"), "é"),
        ("x.json", '[\n {"a": 1},\n {"a": "two"}\n]', "1 two"),
        ("x.json", '{"a": [1, 2]}', "1 2"),
        ("x.jsonl", '[\n {"a": 1}\n]', "1"),
    ],
)  # fmt: skip
def test_values_are_those_of_the_file(tmp_path, name, content, expected):
    assert " ".join(str(value) for value in values(tmp_path, name, content)) == expected


def test_latin_1_has_to_be_said(tmp_path):
    content = '{"a": "x"}\n{"a": "café"}\n'.encode("latin-1")
    with pytest.raises(
        ValueError, match=r"data.path: .*x.jsonl: line 2 is not utf-8 \(byte 0xe9\); say .* data.encoding"
    ):
        values(tmp_path, "x.jsonl", content)
    assert values(tmp_path, "x.jsonl", content, encoding="latin-1") == ["x", "café"]
    with pytest.raises(ValueError, match="data.encoding: there is no encoding 'latin-47'"):
        values(tmp_path, "x.jsonl", content, encoding="latin-47")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": "\\ud800"}\n', "row 2: 'a' has half a character at position 0"),
        ("x.jsonl", '{"a": 1}\n{"a": NaN}\n', "line 2: NaN is no JSON number"),
        ("x.jsonl", '{"a": 1, "a": 2}\n', "line 1: the key 'a' occurs twice"),
        ("x.jsonl", '{"a": 1}\n{"a": \n', "line 2 is no JSON"),
        ("x.jsonl", '{"a": 1}\n7\n', "line 2: is no mapping"),
        ("x.csv", "a,a\n1,2\n", "the column 'a' occurs twice"),
        ("x.csv", "a,b\n1\n", "row 1 has 1 cells for 2 columns"),
        ("x.csv", "a,b\n1,2,3\n", "row 1 has 3 cells for 2 columns"),
        ("x.csv", 'a\n"open\n', "line 2: unexpected end of data"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, content, message):
    with pytest.raises(ValueError) as caught:
        values(tmp_path, name, content)
    assert name in str(caught.value) and message in str(caught.value)


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "1.csv").write_text("a\n007\n")
    (tmp_path / "2.jsonl").write_text('{"a": 8, "b": 1}\n')
    problems = load_problems(Data(path=str(tmp_path)))
    assert [problem.fields for problem in problems] == [{"a": "007", "b": None}, {"a": 8, "b": 1}]
    (tmp_path / "test.csv").write_text("a\n9\n10\n")
    with pytest.raises(ValueError, match="has files of other splits .test.csv.; name the one file"):
        load_problems(Data(path=str(tmp_path)))
    assert [p.fields for p in load_problems(Data(path=str(tmp_path), split="test[1:]"))] == [{"a": "10"}]
