"""``distill preview``: each context once, as its model reads it; what differs; references and filters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_models import build_small_tokenizer, smollm2_tokenizer_dir
from transformers import AutoTokenizer

from sglang_optimal.distill.cli import build_parser, main
from sglang_optimal.distill.config import parse_config
from sglang_optimal.distill.differences import LONGEST, SAME, STUDENT, TEACHER, differences
from sglang_optimal.distill.leaks import LONG
from sglang_optimal.distill.problems import Problem
from sglang_optimal.distill.readers import SideReader
from sglang_optimal.distill.references import FIELDS, FINAL, ITSELF, judge_references

CONTEXTS = {
    "student": "{problem}",
    "strategies": [{"name": "copy", "teacher": "{problem} {answer}"}, {"name": "hint", "teacher": "hint {answer}"}],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer whose template is ``<bos><usr>…<ast>``."""
    return build_small_tokenizer(tmp_path_factory.mktemp("small"))


def run_file(folder: Path, rows: list[dict], contexts: dict | None = None, **sections) -> str:
    (folder / "problems.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", **row}) + "\n" for i, row in enumerate(rows))
    )
    content = {
        "data": {"path": str(folder / "problems.jsonl"), "fields": {"id": "id"}},
        "contexts": {**CONTEXTS, **(contexts or {})},
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "run.yaml")


def previewed(capsys, *argv: str) -> dict:
    assert main(["preview", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_context_is_shown_once(tmp_path, capsys):
    run = run_file(tmp_path, [{"problem": "a?", "answer": "b!"}], sampling={"n": 4}, contexts={"select": "cross"})
    assert main(["preview", run]) == 0
    said = capsys.readouterr().out
    assert said.count("[user] a?\n") == 1
    assert "p0/copy/0,1,2,3, p0/hint/0,1,2,3 · student × 8 · chat\n" in said
    assert "p0/copy/0,1,2,3 · teacher × 4 · chat\n" in said and "p0/hint/0,1,2,3 · teacher × 4 · chat\n" in said
    assert said.count("[user] a? b!") == said.count("[user] hint b!") == 1
    assert "p0 · student 1 and teacher 1 differ" in said and "[user] a?{+ b!+}" in said
    assert "1 problems, 8 samples; the file is valid." in said
    (shown,) = previewed(capsys, run)["problems"]
    assert [len(read["samples"]) for read in (*shown["student"], *shown["teacher"])] == [8, 4, 4]
    assert shown["differences"][0] == {
        "student": 0, "teacher": 0,
        "parts": [{"read_by": "same", "text": "[user] a?"}, {"read_by": "teacher", "text": " b!"}],
    }  # fmt: skip


def test_many_samples(tmp_path, capsys):
    run = run_file(tmp_path, [{"problem": "a?", "answer": "b!"}], {"select": "cross"}, sampling={"n": 64})
    assert main(["preview", run]) == 0
    assert "p0/copy/0…63 · teacher × 64 · chat\n" in capsys.readouterr().out


def test_sides_that_read_the_same(tmp_path, capsys):
    run = run_file(tmp_path, [{"problem": "a?", "answer": "b!"}], {"strategies": [{"teacher": "{problem}"}]})
    assert main(["preview", run]) == 0
    assert "p0 · student and teacher read the same: the teacher knows no more." in capsys.readouterr().out


def test_without_a_tokenizer_it_says_so(tmp_path, capsys):
    rows = [{"problem": "a?", "answer": "b!"}]
    (read,) = previewed(capsys, run_file(tmp_path, rows))["problems"][0]["student"]
    assert read["reading"] == {
        "text": "[user] a?",
        "tokens": None,
        "note": "the run's file names no model (server.model_path); give --tokenizer",
    }
    run = run_file(tmp_path, rows, server={"model_path": "org/model"}, mixing={"student_model_path": "org/small"})
    shown = previewed(capsys, run)["problems"][0]
    assert shown["student"][0]["reading"]["note"] == "org/small is no folder here; give --tokenizer"
    assert shown["teacher"][0]["reading"]["note"] == "org/model is no folder here; give --tokenizer"
    assert main(["preview", run]) == 0
    assert (
        "messages, without the chat template: org/small is no folder here; give --tokenizer." in capsys.readouterr().out
    )
    assert main(["preview", run, "--tokenizer", str(tmp_path / "nowhere")]) == 2
    assert "--tokenizer: cannot load" in capsys.readouterr().err


@pytest.mark.parametrize("by_flag", [False, True])
def test_the_chat_template_is_applied(tmp_path, small, capsys, by_flag):
    """Of the server's folder, or of the flag; a text is as it is."""
    contexts = {"format": {"teacher": "chat", "student": "text"}}
    server = {} if by_flag else {"model_path": str(small)}
    run = run_file(tmp_path, [{"problem": "a?", "answer": "b!"}], contexts, server=server)
    shown = previewed(capsys, run, *(["--tokenizer", str(small)] if by_flag else []))["problems"][0]
    student, teacher = shown["student"][0], shown["teacher"][0]
    assert student["format"] == "text" and student["reading"] == {"text": "a?", "tokens": 2, "note": None}
    assert teacher["format"] == "chat" and teacher["context"][0]["role"] == "user"
    assert teacher["reading"]["text"] in ("<bos><usr>a? b!<ast>", "<bos><usr>hint b!<ast>")
    assert teacher["reading"]["tokens"] == len(teacher["context"][0]["content"]) + 3


def test_a_tokenizer_of_the_student_s(tmp_path, small, capsys):
    run = run_file(tmp_path, [{"problem": "a?", "answer": "b!"}], server={"model_path": str(small)})
    shown = previewed(capsys, run, "--student-tokenizer", str(smollm2_tokenizer_dir()))["problems"][0]
    assert shown["student"][0]["reading"]["text"].startswith("<|im_start|>")
    assert shown["teacher"][0]["reading"]["text"].startswith("<bos>")


def side(server=None, mixing=None, contexts=None, side="student", **flags) -> SideReader:
    values = {"contexts": {**CONTEXTS, **(contexts or {})}, "server": server or {}, "mixing": mixing or {}}
    return SideReader(parse_config(values), side, **flags)


def test_whose_model_and_template(tmp_path, small):
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = "{% for m in messages %}({{ m.content }}){% endfor %}{{ mood }}"
    tokenizer.save_pretrained(other)
    (tmp_path / "given.jinja").write_text("\n[{{ messages[0].content }}]\\n!\n")
    messages = [{"role": "user", "content": "x"}]

    def texts(server, mixing, contexts=None):
        return [side(server, mixing, contexts, of).read(messages).text for of in ("teacher", "student")]

    small_s, other_s = "<bos><usr>x<ast>", "(x)"
    assert texts({"model_path": str(small)}, {}) == [small_s, small_s]
    two = {"student_model_path": str(other)}
    assert texts({"model_path": str(small)}, two) == [small_s, other_s]
    assert texts({"model-path": str(small)}, {"teacher_model_path": str(other)}) == [other_s, small_s]
    given = {"model_path": str(small), "chat_template": str(tmp_path / "given.jinja")}
    assert texts(given, two) == ["[x]\n!", "[x]\n!"]  # as SGLang reads it: a backslash and n are a line feed
    assert texts(given, {**two, "student_chat_template": "own"}) == ["[x]\n!", other_s]
    only = {"model_path": str(small)}
    assert texts(only, {"student_chat_template": str(tmp_path / "given.jinja")}) == [small_s, "[x]\n!"]
    served = {"teacher_model_path": str(other), "teacher_chat_template": "own"}
    assert texts(given, served) == [other_s, "[x]\n!"]
    variables = {"chat_template_kwargs": {"mood": "!"}, "student_chat_template_kwargs": {"mood": "?"}}
    assert texts({"model_path": str(other)}, {}, variables) == ["(x)!", "(x)?"]
    server = {"model_path": str(other), "default_chat_template_kwargs": '{"mood": "."}'}
    assert texts(server, {}, {"student_chat_template_kwargs": {"mood": "?"}}) == ["(x).", "(x)?"]


def test_why_a_chat_is_not_rendered(tmp_path, small):
    bare, named = tmp_path / "bare", tmp_path / "named"
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    tokenizer.chat_template = {"default": "d", "rag": "r {{ messages[0].content }}"}
    tokenizer.save_pretrained(named)
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]

    def note(**server) -> str | None:
        reading = side(server).read(messages)
        assert reading.note is None or reading.text == "[user] x\n[user] y"
        return reading.note

    assert note(model_path=str(bare)) == f"{bare} has no chat template"
    assert note(model_path=str(small), chat_template="chatml").startswith("the chat template chatml is no .jinja file")
    assert note(model_path=str(named), hf_chat_template_name="x") == f"{named} has no chat template 'x'"
    assert side({"model_path": str(named), "hf_chat_template_name": "rag"}).read(messages).text == "r x"
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('one turn alone') }}")
    assert "refuses them: one turn alone" in note(model_path=str(small), chat_template=str(tmp_path / "strict.jinja"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert note(model_path=str(empty)).startswith(f"cannot load {empty}")


def test_the_beginning_of_an_answer(small):
    """Behind the turn that the template opens."""
    reader = side({"model_path": str(small)})
    reading = reader.read([{"role": "user", "content": "x"}, {"role": "assistant", "content": "so"}])
    assert (reading.text, reading.tokens) == ("<bos><usr>x<ast>so", 6)


def test_numbers_below_zero(tmp_path, capsys):
    run = run_file(tmp_path, [{"problem": "a?", "answer": "b!"}])
    for flag in ("--problems", "--judge"):
        assert main(["preview", run, flag, "-1"]) == 2
        assert f"{flag}: must not be negative, got -1." in capsys.readouterr().err


# -- differences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "parts"),
    [
        ("", "", []),
        ("a", "a", [(SAME, "a")]),
        ("", "a b", [(TEACHER, "a b")]),
        ("a b", "", [(STUDENT, "a b")]),
        ("one two", "one three", [(SAME, "one "), (STUDENT, "two"), (TEACHER, "three")]),
        ("x\ny\n", "x\nhint 7\ny\n", [(SAME, "x\n"), (TEACHER, "hint 7\n"), (SAME, "y\n")]),
        ("é 漢 🙂", "é 字 🙂", [(SAME, "é "), (STUDENT, "漢"), (TEACHER, "字"), (SAME, " 🙂")]),
    ],
)
def test_differences(student, teacher, parts):
    assert differences(student, teacher) == parts


@pytest.mark.parametrize("length", [LONGEST // 4, 4 * LONGEST])
def test_differences_put_together_are_both_texts(length):
    student = " ".join(str(i % 97) for i in range(length))
    teacher = student.replace("13", "14") + "\nmore"
    parts = differences(student, teacher)
    assert "".join(text for kind, text in parts if kind != TEACHER) == student
    assert "".join(text for kind, text in parts if kind != STUDENT) == teacher
    assert len(parts) > 3 or length > LONGEST


# -- references ------------------------------------------------------------------------------------------------------

GSM8K = "She sold 48/2 = 24.\nAltogether 72.\n#### 1,072"


def judged(filters: list[dict], *rows: dict, privileged=("answer",)) -> dict[tuple[str, str], tuple[int, int]]:
    config = parse_config({"contexts": CONTEXTS, "filters": filters})
    problems = [Problem(f"p{i}", row) for i, row in enumerate(rows)]
    found = judge_references(config.filters, problems, privileged)
    return {(j.field, j.form): (j.passed, j.judged) for j in found}


@pytest.mark.parametrize(
    ("settings", "answer", "itself", "final"),
    [
        # #### in the answer: a sample never has the whole solution; the pattern takes what comes to be compared.
        ({"match": "exact"}, GSM8K, True, False),
        ({"match": "contains"}, GSM8K, True, False),
        ({"match": "numeric"}, GSM8K, True, True),
        ({"match": "contains", "expected_pattern": r"####\s*(.+)"}, GSM8K, True, False),  # 1072 is not in "1,072"
        ({"match": "numeric", "expected_pattern": r"####\s*(.+)"}, GSM8K, True, True),
        # Thousands separators, and answers without any.
        ({"match": "exact"}, "1,072", True, False),
        ({"match": "numeric"}, "1,072", True, True),
        ({"match": "exact"}, "-72", True, True),
        ({"match": "exact"}, "72", True, True),
        ({"match": "contains"}, "72", True, True),
        ({"match": "numeric"}, "-1,234,567.5", True, True),
        # A box that the filter looks for, in the answer or not.
        ({"match": "numeric", "extract": "boxed"}, "so \\boxed{72}", True, True),
        ({"match": "exact", "extract": "boxed"}, "so \\boxed{72}", False, False),
        ({"match": "exact", "extract": "boxed"}, "72", False, True),
        # Words that the filter looks for: what a sample would say is not known.
        ({"match": "exact", "extract": "pattern", "pattern": "is (.+)"}, "72", False, None),
        # A worked solution that does not say what it comes to.
        ({"match": "numeric"}, "First 48, and 24 more, so that it comes to 72 in all", True, None),
        ({"match": "numeric", "expected_pattern": "x = (.+)"}, "it comes to 72 in all", False, None),
    ],
)
def test_a_reference_and_the_filter(settings, answer, itself, final):
    found = judged([{"type": "answer", **settings}], {"problem": "?", "answer": answer})
    assert found[("answer", ITSELF)] == (int(itself), 1)
    assert found.get(("answer", FINAL)) == (None if final is None else (int(final), 1))


def test_solutions_are_judged_too():
    rows = [
        {"problem": "?", "answer": "72", "solution": "so \\boxed{72}", "hint": "48 + 24", "list": ["72"]},
        {"problem": "?", "answer": "73", "solution": "so \\boxed{74}", "hint": "73", "list": ["x"]},
        {"problem": "?", "answer": "", "solution": "so \\boxed{75}", "hint": None, "list": []},
    ]
    found = judged([{"type": "answer", "match": "numeric"}], *rows, privileged=("answer", "solution", "hint", "list"))
    assert found == {
        ("answer", ITSELF): (2, 2), ("answer", FINAL): (2, 2), ("solution", ITSELF): (1, 2), ("hint", ITSELF): (1, 2),
    }  # fmt: skip
    assert judged([{"type": "finish"}], *rows) == {}


def test_what_is_said_of_references(tmp_path, capsys):
    rows = [{"problem": f"{i}?", "answer": f"it is\n#### 1,00{i}"} for i in range(5)] + [
        {"problem": "5?", "answer": ""}
    ]
    filters = [{"type": "finish"}, {"type": "answer", "match": "exact", "expected_pattern": "####\\s*(.+)"}]
    run = run_file(tmp_path, rows, {"strategies": [{"teacher": "{problem}{{ answer or '' }}"}]}, filters=filters)
    assert main(["preview", run, "--problems", "0"]) == 0
    said = capsys.readouterr().out
    assert "filter answer, field 'answer': the text itself passes in 0 of 5.\n" in said
    assert "  1 problems have no expected answer: every sample of theirs will be rejected.\n" in said
    assert "  p0: wrong answer: it is #### 1,000\n" in said and "p2: wrong" in said and "p3: wrong" not in said
    assert "filter answer, field 'answer': its final answer, as a sample would say it, passes in 0 of 5.\n" in said
    assert "  p0: wrong answer: 1000\n" in said
    assert main(["preview", run, "--problems", "0", "--judge", "2"]) == 0
    assert "passes in 0 of 2 (the first 2 problems)." in capsys.readouterr().out
    found = previewed(capsys, run, "--judge", "2")
    assert found["judged"] == 2 and found["references"][0]["failures"][0] == {
        "problem": "p0", "reason": "wrong answer", "text": "it is\n#### 1,000",
    }  # fmt: skip
    assert previewed(capsys, run, "--judge", "0")["references"] == []
    run = run_file(tmp_path, rows, {"strategies": [{"teacher": "{problem}"}]})
    assert main(["preview", run]) == 0
    assert "no filter of the type answer: the references are not judged." in capsys.readouterr().out


def test_rendered_by_a_real_template():
    """As transformers renders SmolLM2's, whose template adds a system message of its own."""
    folder = str(smollm2_tokenizer_dir())
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reading = side({"model_path": folder}).read(messages)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert reading.text == tokenizer.decode(ids) and reading.tokens == len(ids)
    assert "system" in reading.text


def test_what_the_guide_says_of_it():
    guide = " ".join((Path(__file__).parents[2] / "docs" / "distillation_guide.md").read_text().split())
    section = guide.partition("### Preview")[2].partition("## Choosing alpha")[0]
    args = build_parser().parse_args(["preview", "run.yaml"])
    assert (args.problems, args.judge) == (2, 1000)
    assert "(`--problems`, 2)" in section and "the first 1000 problems (`--judge`)" in section
    assert all(f"`{name}`" in section for name in FIELDS) and f"fewer than {LONG} characters" in section
