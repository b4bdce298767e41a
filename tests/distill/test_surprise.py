"""How much of a sample surprises the student: statistics, columns, the filter, and where the answer first stands."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as parquet
import pytest
import yaml
from stub_server import stub_answer, stub_server
from test_filters import chain, record, verdict
from tiny_models import EOS, SMALL_SPECIAL_TOKENS, build_small_tokenizer, small_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.mentions import NO_ANSWER, NO_MENTION, AnswerField
from sglang_optimal.distill.pipeline import fingerprint
from sglang_optimal.distill.records import schema
from sglang_optimal.distill.store import Tally, find_shards, read_rows
from sglang_optimal.distill.surprise import least_logprob, span_probability, token_spans, tokens_below
from sglang_optimal.distill.token_texts import NO_TOKENIZER, OTHER_TEXT, AnswerProbabilities
from sglang_optimal.token_view import token_pieces

INF = math.inf


def test_of_logprobs():
    assert least_logprob([-1.0, None, -2.0]) == -INF and least_logprob([-1.0, math.nan]) == -INF
    assert least_logprob([-1.0, -2.5]) == -2.5 and math.isnan(least_logprob([]))
    assert tokens_below([math.log(0.002), math.log(0.0009), -INF, None]) == 3
    assert tokens_below([math.log(0.2)], 0.5) == 1 and tokens_below([]) == 0


def test_spans_and_products():
    pieces = ["", " It", " is", " 1", "8", ".", "<end>"]
    spans = token_spans(pieces, "It is 18.")
    assert spans == [(-1, -1), (-1, 2), (2, 5), (5, 7), (7, 8), (8, 9), (9, 14)]
    logprobs = [0.0, -1.0, -1.0, math.log(0.5), math.log(0.1), -1.0, -1.0]
    assert span_probability(spans, logprobs, (6, 8)) == pytest.approx(0.05)
    assert span_probability(spans, [0.0] * 4 + [None, 0.0, 0.0], (6, 8)) == 0.0
    assert span_probability([], [], (0, 1)) is None
    assert token_spans(["It", " was"], "It is") is None
    assert token_spans([], "") == [] and token_spans([], "a") is None


def test_a_character_of_several_tokens_counts_all_of_them():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "是 三。"
    pieces = token_pieces(lambda ids: tokenizer.decode(list(ids)), tokenizer.encode(text).ids)
    logprobs = [math.log(0.5)] * len(pieces)
    spans = token_spans(pieces, text)
    span = AnswerField(match="contains").mention({"answer": "三"}, text)
    assert span == (2, 3) and span_probability(spans, logprobs, span) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("text", "answer", "settings", "found"),
    [
        ("It is 120 or 1,200, so 12.", "12", {}, (23, 25)),
        ("A12 12.5 12", "12", {}, (9, 11)),
        ("at 12:30 or 12", "12", {}, (12, 14)),
        ("10^3 and 10", "10", {}, (9, 11)),
        ("costs $1,250.50 now", "1250.5", {}, (7, 15)),
        ("-5 or 5", "5", {}, (6, 7)),
        ("5? −5", "-5", {}, (3, 5)),
        ("20-12=8", "12", {}, (3, 5)),
        ("so 48/2 = 24", "24", {}, (10, 12)),
        ("it is 1/2", "0.5", {}, (6, 9)),
        ("it is \\frac{1}{2}", "\\frac12", {"match": "math"}, (6, 17)),
        ("so \\boxed{3\\sqrt{13}}", "$3\\sqrt{13}$", {"match": "math"}, (10, 20)),
        ("It costs 41.", "17 + 24 = 41. The answer is 41.", {}, (9, 11)),
        ("It is 18", "3 * 6 = 18\n#### 18", {}, (6, 8)),
        ("It is 18", "18 eggs #### 18 of 20", {"match": "numeric", "expected_pattern": r"####\s*(\d+)"}, (6, 8)),
        ("parisian PARIS", "Paris", {"match": "contains", "ignore_case": True}, (9, 14)),
        ("parisian PARIS", "Paris", {"match": "contains"}, NO_MENTION),
        ("120", "12", {"match": "contains"}, NO_MENTION),
        ("٤٢", "42", {}, (0, 2)),
        ("10:30 it is", "10:30", {"match": "numeric"}, (0, 5)),
        ("18 %", "18%", {}, (0, 2)),
        ("", "5", {}, NO_MENTION),
        ("5", None, {}, NO_ANSWER),
        ("5", " ", {}, NO_ANSWER),
        ("5", "no mark", {"expected_pattern": r"####\s*(.+)"}, NO_ANSWER),
        ("1" * 30, "1" * 30, {}, (0, 30)),
    ],
)
def test_the_first_mention(text, answer, settings, found):
    assert AnswerField(**settings).mention({"answer": answer}, text) == found


def test_which_answer():
    def of(*filters):
        given = parse_config({"contexts": {"student": "s", "strategies": [{"teacher": "t"}]}, "filters": list(filters)})
        return AnswerField.of(given.filters)

    assert of() == AnswerField()
    assert of({"type": "equations", "field": "final"}) == AnswerField("final", None, "numeric")
    answer = {"type": "answer", "match": "contains", "field": "a", "expected_pattern": "(.)", "ignore_case": True}
    assert of({"type": "equations", "field": "final"}, answer) == AnswerField("a", "(.)", "contains", True)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_student_probability": 0.01}, None),
        ({"min_student_probability": 0.011}, "a token that surprises the student"),
        ({"max_tokens_below_floor": 0}, None),
        ({"max_tokens_below_floor": 0, "floor": 0.02}, "tokens that surprise the student"),
        ({"max_tokens_below_floor": 1, "floor": 0.02}, None),
        ({"min_answer_probability": 0.3}, None),
        ({"min_answer_probability": 0.31}, "a leap to the answer"),
        ({"min_log_weight_student": -1.61}, None),
        ({"min_log_weight_student": -1.6}, "a small importance weight"),
    ],
)
def test_the_filter(settings, reason):
    made = record(
        token_ids=[1, 2], student_logprob=[math.log(0.0100001), 0.0], mixture_logprob=[math.log(0.05), 0.0],
        answer_probability=0.3,
    )  # fmt: skip
    assert verdict({"type": "surprise", **settings}, made) == reason


def test_what_is_not_known_does_not_pass():
    everything = {"type": "surprise", "min_student_probability": 0.0, "max_tokens_below_floor": 9}
    assert verdict(everything, record()) == "no student log-probabilities"
    assert verdict(everything, record(token_ids=[])) == "no tokens"
    impossible = record(token_ids=[1, 2], student_logprob=[-INF, -1.0], mixture_logprob=[-INF, -1.0])
    assert verdict({"type": "surprise", "min_student_probability": 1e-300}, impossible) is not None
    assert verdict({"type": "surprise", "max_tokens_below_floor": 0}, impossible) is not None
    assert verdict({"type": "surprise", "min_log_weight_student": -1e9}, impossible) == "a small importance weight"
    answer = {"type": "surprise", "min_answer_probability": 0.0}
    known = {"token_ids": [1], "student_logprob": [-1.0], "mixture_logprob": [-1.0]}
    assert verdict(answer, record(**known)) == "the student's probability of the answer is not known"
    assert verdict(answer, record(**known, answer_unknown=NO_MENTION)) == NO_MENTION


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give at least one of them"),
        ({"floor": 0.01}, "give at least one of them"),
        ({"floor": 0.01, "min_student_probability": 0.1}, "floor: only read with max_tokens_below_floor"),
        ({"min_student_probability": 1.1}, "min_student_probability"),
        ({"max_tokens_below_floor": -1}, "max_tokens_below_floor"),
        ({"max_rare": 1}, "unknown key 'max_rare'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        chain({"type": "surprise", **settings})


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logprobs", "stored"),
    [([-1.0, -7.0, -0.1], (-7.0, 1)), ([-1.0, -INF, -8.0], (None, 2)), ([], (None, 0)), (None, (None, None))],
)
def test_columns(logprobs, stored):
    values = {}  # ten tokens of which nothing is known
    if logprobs is not None:
        values = {"token_ids": [1] * len(logprobs), "student_logprob": logprobs, "mixture_logprob": logprobs}
    row = record(**values, answer_probability=0.25).row()
    assert (row["min_student_logprob"], row["rare_tokens"]) == stored and row["answer_probability"] == 0.25
    assert {str(schema().field(name).type) for name in ("min_student_logprob", "answer_probability")} == {"double"}
    assert str(schema().field("rare_tokens").type) == "int32"


def test_problems_are_counted():
    tally = Tally()
    for problem, kept, rare in (("a", True, 0), ("a", True, 2), ("b", False, 1), ("c", True, None), ("c", False, 0)):
        row = record(problem_id=problem, accepted=kept, rejected_by=None if kept else "x").row()
        tally.add(row | {"rare_tokens": rare})
    assert tally.covered == 2 and tally.k_of_n == {0: 1, 1: 1, 2: 1}
    assert tally.problems == {"a": [2, 2], "b": [0, 1], "c": [1, 2]}
    assert (tally.surprising, tally.judged) == (1, 2)
    assert (Tally().covered, Tally().k_of_n) == (0, {})


def test_by_a_tokenizer(tmp_path):
    folder = str(build_small_tokenizer(tmp_path / "tokenizer"))
    text = "so 12 + 6 = 18."
    ids = [*small_ids(text), SMALL_SPECIAL_TOKENS.index(EOS)]
    logprobs = [math.log(0.5)] * len(ids)
    logprobs[text.index("18")], logprobs[text.index("18") + 1] = math.log(0.25), math.log(0.1)

    def found(**values):
        made = record(**{"text": text, "answer": "18", "token_ids": ids, "student_logprob": logprobs, **values})
        probabilities(made)
        return made.answer_probability, made.answer_unknown

    probabilities = AnswerProbabilities(AnswerField(), folder)
    assert found() == (pytest.approx(0.025), None)
    assert found(answer="19") == (None, NO_MENTION) and found(answer=None) == (None, NO_ANSWER)
    assert found(text="so 18") == (None, OTHER_TEXT)
    assert found(token_ids=[10**6], student_logprob=[0.0]) == (None, OTHER_TEXT)
    assert found(student_logprob=[]) == (None, OTHER_TEXT)
    assert found(text="so 12", answer="12") == (pytest.approx(0.25), None)  # cut by a stop string
    probabilities = AnswerProbabilities(AnswerField())
    assert found() == (None, NO_TOKENIZER)
    assert not probabilities.find(["no/such", None]) and probabilities.find([folder])
    assert found() == (pytest.approx(0.025), None)
    with pytest.raises(ValueError, match="client.tokenizer: 'no/such' is no tokenizer"):
        AnswerProbabilities(AnswerField(), "no/such")


# -- runs ------------------------------------------------------------------------------------------------------------


def settings(tmp_path, **sections) -> str:
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "data": {"path": str(tmp_path / "problems.jsonl")},
        "contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]},
        "output": {"dir": str(tmp_path / "out")} | sections.pop("output", {}),
        "client": {"concurrency": 1} | sections.pop("client", {}),
        **sections,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


def worked(body):
    """Writes "so it is N." in characters, each with probability 1/2; of problem 2 with a null, which was −inf."""
    answer = stub_answer(body)
    number = int(body["session_params"]["mixing"]["student_messages"][0]["content"].split()[0])
    answer["text"] = f"so it is {number + 1}."
    answer["output_ids"] = small_ids(answer["text"])
    size = len(answer["output_ids"])
    for name in ("alpha", "kl_to_student", "kl_to_teacher", "ess_ratio"):
        answer["meta_info"][name] = [0.5] * size
    for name in ("teacher_logprob", "student_logprob", "mixture_logprob"):
        answer["meta_info"][name] = [math.log(0.5)] * size
    if number == 2:
        answer["meta_info"]["student_logprob"][9] = None
    answer["meta_info"]["finish_reason"] = {"type": "stop"}
    return 200, answer


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_run(tmp_path, capsys, format):
    tokenizer = str(build_small_tokenizer(tmp_path / "tokenizer"))
    filters = [{"type": "answer", "match": "numeric"}, {"type": "surprise", "min_answer_probability": 0.1}]
    with stub_server() as stub:
        stub.behave = worked
        run = settings(tmp_path, filters=filters, output={"format": format}, sampling={"n": 2})
        assert main(["run", run, "--endpoint", stub.url, "--no-report"]) == 2
        assert "min_answer_probability needs a tokenizer" in capsys.readouterr().err and not stub.seen
        run = settings(
            tmp_path, filters=filters, output={"format": format}, client={"tokenizer": tokenizer}, sampling={"n": 2}
        )  # fmt: skip
        assert main(["run", run, "--endpoint", stub.url]) == 0
    said = capsys.readouterr()
    assert "3 of 4 problems covered (accepted samples: problems — 0: 1, 2: 3)" in said.out
    assert "3 of 4 problems covered" in said.err
    kept = list(read_rows(find_shards(tmp_path / "out", "accepted")))
    assert [row["answer_probability"] for row in kept] == [pytest.approx(0.5)] * 6
    assert {row["rare_tokens"] for row in kept} == {0}
    lost = list(read_rows(find_shards(tmp_path / "out", "rejected")))
    assert [(row["reject_reason"], row["answer_probability"]) for row in lost] == [("a leap to the answer", 0.0)] * 2
    assert [(row["rare_tokens"], row["min_student_logprob"]) for row in lost] == [(1, None)] * 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| problems covered (with an accepted record) | 3 of 4 |" in card
    assert "## Accepted records of a problem\n\n| accepted | problems |\n|---|---|\n| 0 | 1 |\n| 2 | 3 |\n" in card
    assert "under the student) | 0 of 6 |" in card
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (manifest["problems"], manifest["problems_covered"]) == (4, 3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "6 of 8 accepted, 3 of 4 problems covered, 0 % of the accepted have a surprise." in page


def test_without_a_tokenizer_the_column_is_null_and_a_run_goes_on_as_before(tmp_path, monkeypatch):
    """Records of an older version, without the columns, stay; the tokenizer is no setting of what a record is."""
    run = settings(tmp_path)
    with stub_server() as stub:
        stub.behave = worked
        assert main(["run", run, "--endpoint", stub.url, "--no-report"]) == 0
        (path,) = (tmp_path / "out" / "data").iterdir()
        table = parquet.read_table(path)
        assert table["answer_probability"].to_pylist() == [None] * 4 and table["rare_tokens"].to_pylist().count(1) == 1
        parquet.write_table(table.drop_columns(["min_student_logprob", "rare_tokens", "answer_probability"]), path)
        tokenizer = str(build_small_tokenizer(tmp_path / "tokenizer"))
        run = settings(tmp_path, client={"tokenizer": tokenizer})
        assert main(["run", run, "--endpoint", stub.url, "--n", "2"]) == 0
    rows = list(read_rows(find_shards(tmp_path / "out", "accepted"), ["rare_tokens", "answer_probability"]))
    assert [row["answer_probability"] for row in rows].count(None) == 4 and len(rows) == 8
    from datasets import load_dataset

    loaded = load_dataset(str(tmp_path / "out"), split="train")
    assert sorted(loaded["rare_tokens"], key=str) == [0, 0, 0, 1, None, None, None, None]
    # Of the older ones the report has the series.
    assert "2 of 8 accepted samples (25 %) have a token" in (tmp_path / "out" / "report.html").read_text()
    assert "of which it is known, of 8" in (tmp_path / "out" / "README.md").read_text()


def test_the_fingerprint_of_older_runs():
    contexts = {"student": "s", "strategies": [{"teacher": "t"}]}
    plain = parse_config({"contexts": contexts})
    assert fingerprint(plain) == fingerprint(parse_config({"contexts": contexts, "client": {"tokenizer": "x"}}))
