"""The YAML file of a run: what is accepted, and what an error says."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from sglang_optimal.config import ALPHA_METHODS, DISTILL_SECTIONS, SETTINGS, load_yaml
from sglang_optimal.distill.cli import main
from sglang_optimal.distill.config import DistillConfig, Mixing, json_schema, load_config, parse_config
from sglang_optimal.distill.filters import FILTERS, FilterConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RUNS = [path for path in CONFIGS if path.name != "base.yaml"]
SMALL = {"contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]}}


def changed(**sections):
    values = copy.deepcopy(SMALL)
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def error_of(values) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(values, "run.yaml")
    return str(caught.value)


def test_the_least():
    config = parse_config(SMALL)
    assert config.contexts.strategies[0].name == "default"
    assert config.sampling.n == 1 and config.filters == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "contexts: is required."),
        (changed(data={"pat": "x"}), "data: unknown key 'pat'. Did you mean 'path'?"),
        (changed(data={"limit": 0}), "data.limit: Input should be greater than 0; got 0."),
        (changed(data={"path": " "}), "data.path: must not be empty."),
        (changed(samplin={}), "unknown key 'samplin'. Did you mean 'sampling'?"),
        (changed(contexts={"student": 3}), "contexts.student: must be text, a mapping with `user`, or a list"),
        (
            changed(contexts={"student": {"user": "", "usr": "x"}}),
            "contexts.student: unknown key 'usr'. Did you mean 'us",
        ),
        (changed(contexts={"student": [{"role": "usr", "content": ""}]}), "contexts.student[0].role: Input should be"),
        (changed(contexts={"strategies": []}), "contexts.strategies: List should have at least 1 item"),
        (
            changed(contexts={"strategies": [{"teacher": "a"}, {"teacher": "b"}]}),
            "contexts: strategies: the name 'default' occurs twice",
        ),
        (changed(contexts={"format": "text", "student": {"user": "x"}}), "contexts: format: 'text' takes templates"),
        (
            changed(contexts={"format": "text", "chat_template_kwargs": {"a": 1}}),
            "contexts: chat_template_kwargs: has no effect",
        ),
        (changed(contexts={"format": "txt"}), "contexts.format: Input should be 'chat' or 'text'; got 'txt'."),
        (changed(contexts={"format": 3}), "contexts.format: Input should be 'chat' or 'text'; got 3."),
        (changed(contexts={"format": {"student": "text"}}), "contexts.format.teacher: is required."),
        (
            changed(contexts={"format": {"teacher": "chat", "studnt": "text"}}),
            "2 errors:\n  contexts.format.student: is required.\n  contexts.format: unknown key 'studnt'. Did you mean",
        ),
        (
            changed(contexts={"format": {"teacher": "chat", "student": "txt"}}),
            "contexts.format.student: Input should be 'chat' or 'text'; got 'txt'.",
        ),
        (
            changed(contexts={"format": {"teacher": "chat", "student": "text"}, "student": {"user": "x"}}),
            "contexts: format: 'text' takes templates that are plain text, not messages; student is not",
        ),
        (
            changed(
                contexts={"format": {"teacher": "text", "student": "chat"}, "strategies": [{"teacher": {"user": "x"}}]}
            ),
            "contexts: format: 'text' takes templates that are plain text, not messages; strategies[0].teacher is not",
        ),
        (
            changed(
                contexts={
                    "format": {"teacher": "chat", "student": "text"},
                    "strategies": [{"teacher": "x", "student": [{"role": "user", "content": "x"}]}],
                }
            ),
            "contexts: format: 'text' takes templates that are plain text, not messages; strategies[0].student is not",
        ),
        (
            changed(contexts={"format": {"teacher": "chat", "student": "text"}, "chat_template_kwargs": {"a": 1}}),
            "contexts: chat_template_kwargs: is for both sides, and the student reads plain text; give teacher_",
        ),
        (
            changed(
                contexts={"format": {"teacher": "chat", "student": "text"}, "student_chat_template_kwargs": {"a": 1}}
            ),
            "contexts: student_chat_template_kwargs: has no effect with format 'text'.",
        ),
        (
            changed(contexts={"teacher_chat_template_kwargs": {"tokenize": True}}),
            "contexts.teacher_chat_template_kwargs: 'tokenize' is no variable of a chat template",
        ),
        (
            changed(
                contexts={"format": {"teacher": "chat", "student": "text"}}, mixing={"student_chat_template": "own"}
            ),
            "mixing.student_chat_template: has no effect, since the student reads plain text",
        ),
        (changed(sampling={"temperature": -1}), "sampling.temperature: Input should be greater"),
        (changed(sampling={"return_top_k": 4}), "sampling: unknown key 'return_top_k'. It belongs to `output`."),
        (
            changed(output={"series": ["alpha", "teacher_entrpy"]}),
            "output.series: unknown series 'teacher_entrpy'. Did you mean 'teacher_entropy'?",
        ),
        (changed(output={"series": "alpha"}), "output.series: must be true, false or a list of series, got 'alpha'."),
        (changed(output={"series": []}), "output.series: must be true, false or a list of series, got []."),
        (changed(output={"series": [3]}), "output.series: unknown series 3. Known: alpha"),
        (changed(output={"return_top_k": -1}), "output.return_top_k: Input should be greater than or equal to 0"),
        (changed(output={"return_top_k": 1025}), "output.return_top_k: Input should be less than or equal to 1024"),
        (changed(output={"return_top_k": True}), "output.return_top_k: Input should be a valid integer; got True."),
        (
            changed(output={"return_top_k": 1, "top_k_of": "techer"}),
            "output.top_k_of: unknown side 'techer'. Did you mean 'teacher'?",
        ),
        (changed(output={"return_top_k": 1, "top_k_of": []}), "output.top_k_of: List should have at least 1 item"),
        (changed(output={"top_k_of": ["teacher"]}), "output: top_k_of: only read with return_top_k."),
        (
            changed(output={"return_top_k": 1000, "top_k_of": "student"}, sampling={"max_new_tokens": 2001}),
            "output.return_top_k: 1000 tokens of 1 sides for each of up to 2001 output tokens are 2001000",
        ),
        (changed(filters=[{"type": "lenght"}]), "filters[0]: unknown filter 'lenght'. Did you mean 'length'?"),
        (changed(filters=[{"min": 1}]), "filters[0]: needs a `type`: length, finish"),
        (changed(filters=[{"type": "length", "min": 1}]), "filters[0]: unknown key 'min'."),
        (changed(filters=[{"type": "alpha"}]), "filters[0]: min_mean, max_mean, max_share_above: give at least one"),
        (changed(filters=[{"type": "coverage"}]), "filters[0]: min_mean_logprob, floor: give at least one"),
        (changed(filters=[{"type": "finish"}, {"type": "finish"}]), "filters: 'finish' occurs twice"),
        (
            changed(filters=[{"type": "answer", "extract": "pattern", "pattern": "("}]),
            "filters[0].pattern: is no regular expression",
        ),
        (changed(filters=[{"type": "function", "function": "x"}]), "filters[0].function: String should match"),
        (changed(client={"endpoints": ["gpu:3"]}), "client.endpoints: 'gpu:3' is no URL; write it as http://"),
        (changed(mixing={"alpha_method": "kl"}), "mixing.alpha_method: Input should be"),
        (changed(mixing={"alpha_min": 0.8, "alpha_max": 0.2}), "mixing: alpha_min: 0.8 is greater than alpha_max"),
        (changed(mixing={"student_model": "x"}), "mixing: unknown key 'student_model'. Did you mean 'student_mode"),
    ],
)
def test_error_names_the_key(values, message):
    assert error_of(values).startswith(f"run.yaml: {message}"), error_of(values)


def test_all_errors_at_once():
    text = error_of(changed(data={"limit": 0}, sampling={"n": 0}))
    assert text.splitlines()[0] == "run.yaml: 2 errors:"
    assert "data.limit" in text and "sampling.n" in text


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "", "just text"])
def test_not_a_mapping(tmp_path, content, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert str(path) in capsys.readouterr().err


def test_missing_file(capsys):
    assert main(["preview", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_shipped_configs(path):
    load_config(path)
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(path.read_text()))
    load_yaml(path)  # starts a server too


def test_shipped_schema_is_up_to_date():
    text = (CONFIGS[0].parent / "schema.json").read_text()
    assert json.loads(text) == json_schema(), "python -m sglang_optimal.distill schema --output configs/schema.json"


def test_schema_refuses_what_we_refuse():
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    assert validator.is_valid(SMALL)
    assert not validator.is_valid(changed(data={"pat": "x"}))
    assert not validator.is_valid(changed(filters=[{"type": "lenght"}]))
    assert not validator.is_valid(changed(contexts={"student": 3}))
    assert validator.is_valid(changed(contexts={"format": {"teacher": "chat", "student": "text"}}))
    for wrong in ("txt", {"teacher": "chat"}, {"teacher": "chat", "student": "txt"}):
        assert not validator.is_valid(changed(contexts={"format": wrong})), wrong
    asked = {"series": ["teacher_rank"], "return_top_k": 8, "top_k_of": ["mixture"]}
    assert validator.is_valid(changed(output=asked))
    for name, wrong in (("series", ["teacher_rnk"]), ("series", []), ("return_top_k", 1025), ("top_k_of", ["teach"])):
        assert not validator.is_valid(changed(output={**asked, name: wrong})), name


def keys_of(schema: dict, name: str) -> set[str]:
    return set(schema["$defs"][name]["properties"])


def test_every_key_is_documented():
    """In the schema (descriptions) and in configs/distillation.yaml (the key by name, with a comment or a value)."""
    schema = json_schema()
    text = (CONFIGS[0].parent / "distillation.yaml").read_text()
    for name, definition in schema["$defs"].items():
        for key, value in definition.get("properties", {}).items():
            assert re.search(rf"\b{key}\b", text), f"{name}.{key} is not in configs/distillation.yaml"
            described = "description" in value or key in ("type", "role", "content")
            assert described, f"{name}.{key} has no description"


def test_same_sections_and_keys_as_the_server():
    assert set(DistillConfig.model_fields) == {*DISTILL_SECTIONS, "mixing", "server"}
    assert set(Mixing.model_fields) == set(SETTINGS)
    methods = json_schema()["$defs"]["Mixing"]["properties"]["alpha_method"]["anyOf"][0]["enum"]
    assert tuple(methods) == ALPHA_METHODS


def test_every_filter_is_in_the_union():
    union = set(FilterConfig.__origin__.__args__)
    assert union == set(FILTERS.values())
    for name, filter_class in FILTERS.items():
        assert filter_class.model_fields["type"].annotation.__args__ == (name,)


def test_schema_command(tmp_path, capsys):
    assert main(["schema", "--output", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == json_schema()
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
