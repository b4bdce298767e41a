"""`distill compare`: runs paired by problem, against figures that were worked out by hand."""

from __future__ import annotations

import json

import pytest
from made_runs import config_of, contents, make_run, record, refused

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.compare import compare
from sglang_optimal.distill.passes import ALONE, passes

ALONE_SAMPLING = {ALONE: "student"}


def samples(problem: str, *tokens: int, **more):
    """Of a problem; a negative number of tokens: rejected."""
    return [record(problem, k, tokens=abs(n), accepted=n > 0, **more) for k, n in enumerate(tokens)]


@pytest.fixture
def pair(tmp_path):
    """A: a mixture, two samples a problem, and a problem of its own. B: the student alone, three samples."""
    a = make_run(tmp_path / "A", samples("p", 3, -2) + samples("q", -2, -2) + samples("r", 4, 1) + samples("s", 9))
    alone = {"sampling": ALONE_SAMPLING}
    records = [*samples("p", 2, 2, -2, **alone), *samples("q", 5, -1, -1, **alone), *samples("r", -2, -2, -3, **alone)]
    return a, make_run(tmp_path / "B", records[::-1])  # in whichever order they came


def test_figures(pair):
    before = [contents(folder) for folder in pair]
    result = compare(pair)
    assert [contents(folder) for folder in pair] == before
    assert result["problems"] == {"common": 3, "of": {"A": 4, "B": 3}}
    a, b = result["levels"]["all"]["runs"].values()
    assert (a["samples"], a["accepted"], a["covered"], a["tokens"], a["passes"]) == (6, 3, 2, 14, 28)
    assert (b["samples"], b["accepted"], b["covered"], b["tokens"], b["passes"]) == (9, 3, 2, 20, 20)
    assert a["accepted_tokens"] == 8 and b["accepted_tokens"] == 9
    assert a["accepted_of_samples"] == [
        {"accepted": k, "samples": 2, "problems": 1} for k in range(3)
    ]  # fmt: skip
    assert a["mean_rate"] == pytest.approx(0.5) and b["mean_rate"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert a["accepted_per_1000_passes"] == pytest.approx(3000 / 28)
    assert b["accepted_per_1000_passes"] == pytest.approx(150)
    # Wilson: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with p = 2/3, n = 3, z = 1.96
    assert a["covered_share"] == {
        "value": pytest.approx(2 / 3), "low": pytest.approx(0.20766, abs=1e-5), "high": pytest.approx(0.93851, abs=1e-5)
    }  # fmt: skip


def test_equal_tokens_and_equal_passes(pair):
    """In rounds: p, q, r, then their second samples. Of B those up to r's second (2 + 5 + 2 + 2 + 1 + 2 = 14 tokens),
    of A, of two passes a token, those up to r's first (6 + 4 + 8 = 18 passes: p's second would make it 22 of 20)."""
    levels = compare(pair)["levels"]
    assert levels["tokens"]["budget"] == 14
    a, b = levels["tokens"]["runs"].values()
    assert a == levels["all"]["runs"]["A"]
    assert (b["samples"], b["accepted"], b["covered"], b["tokens"]) == (6, 3, 2, 14)
    assert levels["passes"]["budget"] == 20
    a, b = levels["passes"]["runs"].values()
    assert (a["samples"], a["accepted"], a["covered"], a["tokens"], a["passes"]) == (3, 2, 2, 9, 18)
    assert b == levels["all"]["runs"]["B"]


def test_differences(pair):
    (difference,) = compare(pair)["levels"]["all"]["differences"]
    assert (difference["of"], difference["minus"]) == ("B", "A")
    # B alone covers q, A alone r. Of three problems drawn with replacement, all are q (or r) in 1 of 27 > 2.5 %.
    assert difference["covered_by_one_alone"] == [1, 1] and difference["mcnemar_p"] == 1.0
    assert difference["covered_share"] == {"value": 0.0, "low": -1.0, "high": 1.0}
    assert difference["accepted_per_1000_passes"]["value"] == pytest.approx(150 - 3000 / 28)
    # p 1/6, q 1/3, r −1
    assert difference["mean_rate"]["value"] == pytest.approx((1 / 6 + 1 / 3 - 1) / 3)
    assert difference["mean_rate"]["low"] == pytest.approx(-1) and difference["mean_rate"]["high"] == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize(("only", "p"), [(0, 1.0), (1, 1.0), (5, 0.0625), (6, 0.03125)])
def test_exact_mcnemar(tmp_path, only, p):
    """2 · 2⁻ⁿ where one run covers n problems that the other does not."""
    names = [f"p{i}" for i in range(8)]
    a = make_run(tmp_path / "a", [record(name, accepted=i >= only) for i, name in enumerate(names)])
    b = make_run(tmp_path / "b", [record(name) for name in names])
    (difference,) = compare([a, b])["levels"]["all"]["differences"]
    assert difference["covered_by_one_alone"] == [only, 0] and difference["mcnemar_p"] == pytest.approx(p)
    assert difference["covered_share"]["value"] == pytest.approx(only / 8)
    assert (difference["covered_share"]["low"] > 0) == (only >= 5)


def test_the_bootstrap_is_paired(tmp_path):
    """Problems differ much, the runs by one accepted sample in each: the difference is sure."""
    a = make_run(tmp_path / "a", [r for i in range(6) for r in samples(f"p{i}", *[2] * i, *[-2] * (6 - i))])
    b = make_run(tmp_path / "b", [r for i in range(6) for r in samples(f"p{i}", *[2] * (i + 1), *[-2] * (5 - i))])
    (difference,) = compare([a, b])["levels"]["all"]["differences"]
    assert difference["mean_rate"] == {key: pytest.approx(1 / 6) for key in ("value", "low", "high")}
    assert compare([a, b]) == compare([a, b])


def test_logprobs_and_surprises(tmp_path):
    """Of accepted samples alone, a token as much as another. ln 0.001 = −6.908."""
    records = [
        record("p", 0, student=[-1.0, -2.0, -6.9]), record("p", 1, student=[-7.0]), record("p", 2, tokens=0),
        record("p", 3, student=[-9.0], accepted=False), record("p", 4, student=[float("-inf")]),
    ]  # fmt: skip
    a = make_run(tmp_path / "a", records)
    b = make_run(tmp_path / "b", [record("p", student=[-0.5])], config_of(output={"series": False}))
    runs = compare([a, b])["levels"]["all"]["runs"]
    assert runs["a"]["student_logprob"] == pytest.approx((-9.9 - 7.0) / 4)
    assert runs["a"]["surprising"] == 2 and runs["a"]["surprising_share"]["value"] == pytest.approx(2 / 4)
    assert runs["b"]["student_logprob"] == -0.5


def test_passes():
    row = record(tokens=3).row()
    assert passes(row) == 6
    assert passes(record(tokens=3, sampling=ALONE_SAMPLING).row()) == 3
    assert passes(refused().row()) == 0


def test_three_runs_and_the_table(pair, tmp_path, capsys):
    c = make_run(tmp_path / "[c]", samples("p", 2) + samples("x", 2), state="stopped")
    out = tmp_path / "some" / "figures.json"
    assert main(["compare", *map(str, pair), str(c), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 problems in common; there are 4 of A, 3 of B, 2 of [c]" in said and "[c] is not complete" in said
    for words in (
        "all samples",
        "equal tokens (2)",
        "equal forward passes (4)",
        "B − A",
        "[c] − A",
        "[c] − B",
        "1 : 0",
    ):
        assert words in said or words == "1 : 0", words
    result = json.loads(out.read_text())
    assert result == json.loads(json.dumps(compare([*pair, c])))
    pairs = [(d["of"], d["minus"]) for d in result["levels"]["all"]["differences"]]
    assert pairs == [("B", "A"), ("[c]", "A"), ("[c]", "B")]


def test_nothing_accepted_and_nothing_sampled(tmp_path, capsys):
    a, b = (make_run(tmp_path / name, [refused("p"), refused("q")]) for name in "ab")
    assert main(["compare", str(a), str(b)]) == 0
    runs = compare([a, b])["levels"]["passes"]
    assert runs["budget"] == 0 and runs["runs"]["a"]["samples"] == 2 and runs["runs"]["a"]["student_logprob"] is None
    assert runs["differences"][0]["accepted_per_1000_passes"] is None


def test_machines_and_journals(tmp_path):
    a = make_run(tmp_path / "a", samples("p", 2, 2), shard=(0, 2))
    make_run(a, samples("q", 2), shard=(1, 2), finish=False)
    b = make_run(tmp_path / "b", samples("p", 2) + samples("q", -2))
    result = compare([a, b])
    assert result["problems"]["common"] == 2 and result["levels"]["all"]["runs"]["a"]["accepted"] == 3
    assert result["runs"] == [{"name": "a", "complete": False}, {"name": "b", "complete": True}]


def test_folders_of_one_name(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    folders = [make_run(tmp_path / name / "run", [record()]) for name in ("x", "y")]
    assert [run["name"] for run in compare(folders)["runs"]] == [str(folder) for folder in folders]


def test_what_cannot_be_compared(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", [record("p")]), make_run(tmp_path / "b", [record("q")])
    c = make_run(tmp_path / "c", [record("p", fields={"problem": "Another?", "answer": "1"})])
    for folders, said in (
        ((a, b), "no problem in common"),
        ((a, c), f"problem 'p' of {c} has other fields than in {a}"),
        ((a,), "two or more runs, each once"),
        ((a, a), "two or more runs, each once"),
        ((a, tmp_path), "has no run in it"),
    ):
        assert main(["compare", *map(str, folders)]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", str(a), str(a / ".." / "c"), "--seed=-1"]) == 2
