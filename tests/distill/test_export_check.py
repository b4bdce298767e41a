"""Exports are compared with what was sampled, as TRL renders and tokenizes them; templates of the big families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trl
from tiny_models import build_small_tokenizer, smollm2_tokenizer_dir
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from trl.trainer.sft_trainer import _tokenize

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.export import export
from sglang_optimal.distill.export_check import load_tokenizer
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.store import RecordStore, find_shards, read_rows

STUDENT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 3 + 4?"}]
ANSWER = "It is 7, of course."
THOUGHT = "<think>\nThree and four.\n</think>\n\nIt is 7."
# family: (template of TRL's, or None for the tokenizer's own; end of a turn; other special tokens; start)
FAMILIES = {
    "smollm2": (None, "<|im_end|>", [], None),
    "qwen2_5": ("qwen2_5", "<|im_end|>", [], None),
    "qwen3": ("qwen3", "<|im_end|>", ["<think>", "</think>"], None),
    "llama3": (
        "llama3", "<|eot_id|>", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>",
    ),
    "gemma": ("gemma", "<end_of_turn>", ["<bos>", "<start_of_turn>"], "<bos>"),
    "phi3": ("phi3", "<|end|>", ["<|system|>", "<|user|>", "<|assistant|>"], None),
}  # fmt: skip


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3's and Qwen's tokenizers split a text, but for apostrophes."""


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")

    def made(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            template, end, special, start = FAMILIES[family]
            tokenizer = AutoTokenizer.from_pretrained(smollm2_tokenizer_dir())
            tokenizer.add_special_tokens({"additional_special_tokens": [end, *special]})
            tokenizer.eos_token = end
            if start is not None:
                tokenizer.bos_token = start
            if template is not None:
                # Theirs keep line feeds together, whatever follows; SmolLM2's splits them before a letter.
                split = pre_tokenizers.Split(Regex(WORDS), "isolated")
                bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
                tokenizer.chat_template = (
                    Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
                ).read_text()
            tokenizer.save_pretrained(folder)
        return folder

    return made


def sampled(folder: Path, context, text: str, *, finish="stop", ended=True, variables=None, ids=None, **more) -> Record:
    """What a server with this tokenizer would have read and given."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if isinstance(context, str):
        prompt = tokenizer(context)["input_ids"]
    else:
        continued = context[-1]["role"] == "assistant"
        prompt = tokenizer.apply_chat_template(
            context, return_dict=False, add_generation_prompt=not continued, continue_final_message=continued,
            **(variables or {}),
        )  # fmt: skip
    tokens = ids or tokenizer(text, add_special_tokens=False)["input_ids"]
    if ended:
        tokens = [*tokens, tokenizer.eos_token_id]
    return Record(
        "p/s/0", "p", "s", 0, {}, context, context, text, tokens, finish, student_prompt_ids=list(prompt),
        sampling={"student_chat_template_kwargs": variables} if variables else {},
        models={"student_model": str(folder)}, **more,
    )  # fmt: skip


def run_of(folder: Path, *records: Record) -> Path:
    store = RecordStore(folder)
    for i, record in enumerate(records):
        record.id = f"p{i}/s/0"
        store.append(record)
    store.finalize()
    store.write_json(store.manifest_path, {"state": "complete"})
    store.close()
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained_on(tokenizer, row: dict) -> list[int]:
    """Ids of a row in SFTTrainer's own words."""
    if isinstance(row.get("prompt"), str):
        return _tokenize(tokenizer, row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
    messages = row.get("messages") or row["prompt"] + row["completion"]
    return _tokenize(tokenizer, messages, **row.get("chat_template_kwargs", {}))["input_ids"]


@pytest.mark.parametrize("format", ["sft", "trl-sft"])
@pytest.mark.parametrize(
    ("family", "variables", "text"),
    [
        ("smollm2", None, ANSWER), ("qwen2_5", None, ANSWER), ("llama3", None, ANSWER), ("phi3", None, ANSWER),
        ("qwen3", {"enable_thinking": True}, THOUGHT), ("qwen3", {"enable_thinking": False}, ANSWER),
    ],
)  # fmt: skip
def test_the_trainer_reads_what_was_read_and_sampled(tmp_path, tokenizer_of, family, variables, text, format):
    folder = tokenizer_of(family)
    record = sampled(folder, STUDENT, text, variables=variables)
    done = export(run_of(tmp_path / "run", record), tmp_path / "out.jsonl", format)
    assert (done.written, done.checked, done.differing) == (1, True, {})
    ids = trained_on(AutoTokenizer.from_pretrained(folder), rows(tmp_path / "out.jsonl")[0])
    expected = [*record.student_prompt_ids, *record.token_ids]
    assert ids[: len(expected)] == expected


@pytest.mark.parametrize("context", [STUDENT[1:], [STUDENT[1], {"role": "assistant", "content": "Well,"}]])
def test_gemma_and_a_prefix(tmp_path, tokenizer_of, context):
    """Its template has no system turn; and where the server continues a turn, the prefix is a part of it."""
    folder = tokenizer_of("gemma")
    record = sampled(folder, context, " it is 7." if len(context) > 1 else "It is 7.")
    done = export(run_of(tmp_path / "run", record), tmp_path / "out.jsonl", "trl-sft")
    assert (done.written, done.differing) == (1, {})
    ids = trained_on(AutoTokenizer.from_pretrained(folder), rows(tmp_path / "out.jsonl")[0])
    expected = [*record.student_prompt_ids, *record.token_ids]
    assert ids[: len(expected)] == expected


def test_plain_text(tmp_path, tokenizer_of):
    folder = tokenizer_of("smollm2")
    record = sampled(folder, "Question: 3 + 4?\nAnswer:", " 7")
    run = run_of(tmp_path / "run", record)
    for format in ("trl-sft", "text"):
        assert export(run, tmp_path / f"{format}.jsonl", format).differing == {}
    ids = trained_on(AutoTokenizer.from_pretrained(folder), rows(tmp_path / "trl-sft.jsonl")[0])
    assert ids == [*record.student_prompt_ids, *record.token_ids]


def test_another_prompt_is_refused(tmp_path, tokenizer_of, capsys):
    """A trainer with another template."""
    run = run_of(tmp_path / "run", sampled(tokenizer_of("smollm2"), STUDENT, ANSWER))
    argv = ["export", str(run), "--output", str(tmp_path / "out.jsonl"), "--tokenizer", str(tokenizer_of("phi3"))]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "record p0/s/0: the trainer would read another prompt than the student did: was " in said
    assert "<|im_start|>" in said and "<|system|>" in said and not (tmp_path / "out.jsonl").exists()
    assert main([*argv, "--on-mismatch", "keep"]) == 0
    assert "kept: 1 records: the trainer would read another prompt" in capsys.readouterr().out


def test_tokens_that_merge_over_the_end_of_the_prompt_are_refused(tmp_path, tokenizer_of):
    """Llama 3's template ends with two line feeds, which SmolLM2's tokenizer does not keep together before a letter."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of("smollm2"))
    tokenizer.chat_template = AutoTokenizer.from_pretrained(tokenizer_of("llama3")).chat_template
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "both")
    run = run_of(tmp_path / "run", sampled(tmp_path / "both", STUDENT, ANSWER))
    with pytest.raises(ValueError, match="record p0/s/0: the trainer would read another prompt"):
        export(run, tmp_path / "out.jsonl", "trl-sft")


def test_samples_that_were_cut_or_have_other_tokens(tmp_path, tokenizer_of, capsys):
    folder = tokenizer_of("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "seven"]
    run = run_of(
        tmp_path / "run",
        sampled(folder, STUDENT, ANSWER),
        sampled(folder, STUDENT, "It is", finish="length", ended=False),
        sampled(folder, STUDENT, "It is 7", ended=False),  # a stop string
        sampled(folder, STUDENT, "seven", ids=letters),
    )
    assert main(["export", str(run), "--output", str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "1 records, compared with what was sampled" in said
    assert "2 records: the trainer would add an end" in said and "1 records: the sample's text has other tokens" in said
    assert export(run, tmp_path / "all.jsonl", "sft", on_mismatch="keep").differing == {"end": 2, "tokens": 1}
    assert len(rows(tmp_path / "all.jsonl")) == 4
    with pytest.raises(ValueError, match="record p1/s/0: the trainer would add an end where the sample was cut"):
        export(run, tmp_path / "no.jsonl", "sft", on_mismatch="refuse")
    assert export(run, tmp_path / "tokens.jsonl", "trl-tokens").written == 4
    cut = run_of(tmp_path / "cut", sampled(folder, STUDENT, "It is", finish="length", ended=False))
    with pytest.raises(ValueError, match="--on-mismatch: no record is left; 1 records: the trainer would add an end"):
        export(cut, tmp_path / "cut.jsonl", "sft")


def test_without_a_tokenizer_or_ids(tmp_path, tokenizer_of, capsys):
    record = sampled(tokenizer_of("smollm2"), STUDENT, ANSWER)
    record.models = {"student_model": "org/somewhere-else"}
    argv = ["export", str(run_of(tmp_path / "run", record)), "--output", str(tmp_path / "out.jsonl")]
    assert main(argv) == 2
    assert "--tokenizer: give the student's (the records name 'org/somewhere-else'" in capsys.readouterr().err
    assert main([*argv, "--no-check"]) == 0
    assert "1 records\n" in capsys.readouterr().out
    record.student_prompt_ids = []
    old = run_of(tmp_path / "old", record)
    with pytest.raises(ValueError, match="--no-check: is needed for records without student_prompt_ids"):
        export(old, tmp_path / "old.jsonl", "sft", tokenizer=str(tokenizer_of("smollm2")))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_shards_of_older_versions_have_fewer_columns(tmp_path, tokenizer_of, suffix):
    import pyarrow
    import pyarrow.parquet as parquet

    run = run_of(tmp_path / "run", sampled(tokenizer_of("smollm2"), STUDENT, ANSWER))
    (shard,) = find_shards(run, "accepted")
    (row,) = read_rows([shard])
    shard.unlink()
    old = {key: value for key, value in row.items() if key not in ("student_prompt_ids", "teacher_prompt_ids")}
    if suffix == ".jsonl":
        shard.with_suffix(suffix).write_text(json.dumps(old) + "\n")
    else:
        parquet.write_table(pyarrow.Table.from_pylist([old]), shard)
    (read,) = read_rows(find_shards(run, "accepted"), ["id", "student_prompt_ids"])
    assert read == {"id": "p0/s/0", "student_prompt_ids": None}
    assert export(run, tmp_path / "out.jsonl", "sft", check=False, columns=["student_prompt_ids"]).written == 1
    assert main(["report", str(run)]) == 0
    with pytest.raises(ValueError, match="is damaged or no shard"):
        list(read_rows(find_shards(run, "accepted"), ["no_such_column"]))


def test_code_of_a_tokenizer_is_not_run_whatever_is_answered(tmp_path, monkeypatch):
    """transformers would ask on the terminal."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="(?s)^--tokenizer: cannot load .*custom code"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "was_run").exists()


BASE_END = "<|endoftext|>"


@pytest.fixture(scope="module")
def base_model(tokenizer_of):
    """The tokenizer of a base model: its texts end with another token than the turns of its family's chats."""
    folder = tokenizer_of("qwen2_5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = BASE_END
    base = folder.with_name("base")
    tokenizer.save_pretrained(base)
    return base


def beside_a_chat(base: Path, text: str, end: str, **more) -> Record:
    """A sample of a student that read plain text, and whose teacher read a chat."""
    record = sampled(base, "Question: 3 + 4?\nAnswer:", text, ended=False, **more)
    tokenizer = AutoTokenizer.from_pretrained(base)
    record.token_ids = [*record.token_ids, *tokenizer(end)["input_ids"]]
    record.teacher_context = STUDENT
    return record


def test_a_text_student_beside_a_chat_teacher(tmp_path, base_model, capsys):
    """The trainer ends a text with its own end token, where the teacher's turn may have ended."""
    own, turn = beside_a_chat(base_model, " It is 7.", BASE_END), beside_a_chat(base_model, " It is 7!", "<|im_end|>")
    cut = beside_a_chat(base_model, " It is", "", finish="length")
    run = run_of(tmp_path / "run", own, turn, cut)
    argv = ["export", str(run), "--output", str(tmp_path / "out.jsonl")]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "2 records, compared" in said and "1 records end with the trainer's own end token, where another" in said
    assert "left out: 1 records: the trainer would add an end where the sample was cut" in said
    assert rows(tmp_path / "out.jsonl") == [
        {"prompt": "Question: 3 + 4?\nAnswer:", "completion": " It is 7."},
        {"prompt": "Question: 3 + 4?\nAnswer:", "completion": " It is 7!"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    for row, record in zip(rows(tmp_path / "out.jsonl"), (own, turn), strict=True):
        expected = [*record.student_prompt_ids, *record.token_ids[:-1], tokenizer.eos_token_id]
        assert trained_on(tokenizer, row) == expected
    with pytest.raises(ValueError, match="record p1/s/0: the trainer would end the plain text with its own end token"):
        export(run, tmp_path / "no.jsonl", "trl-sft", on_mismatch="refuse")
    done = export(run, tmp_path / "text.jsonl", "text", on_mismatch="keep")
    assert (done.written, done.other_ends, done.differing) == (3, 1, {"end": 1})
    assert export(run, tmp_path / "tokens.jsonl", "trl-tokens").written == 3
    assert rows(tmp_path / "tokens.jsonl")[1]["input_ids"] == [*turn.student_prompt_ids, *turn.token_ids]
    with pytest.raises(ValueError, match="use trl-sft or text"):
        export(run, tmp_path / "chat.jsonl", "sft")


def test_a_text_whose_last_token_joins_the_sample_s_first(tmp_path, base_model):
    """Of one row, and no reason to refuse all: the tokenizer is the right one, as the text alone shows."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    ids = tokenizer("It is 7.", add_special_tokens=False)["input_ids"]
    joins = sampled(base_model, "Answer: ", "It is 7.", ids=ids)
    fits = sampled(base_model, "Answer:", " It is 7.")
    done = export(run_of(tmp_path / "run", joins, fits), tmp_path / "out.jsonl", "trl-sft")
    assert (done.written, done.differing, done.other_ends) == (1, {"tokens": 1}, 0)
    other = run_of(tmp_path / "other", sampled(base_model, "Answer:", " It is 7."))
    with pytest.raises(ValueError, match="the trainer would read another prompt"):
        export(other, tmp_path / "no.jsonl", "trl-sft", tokenizer=str(build_small_tokenizer(tmp_path / "small")))
