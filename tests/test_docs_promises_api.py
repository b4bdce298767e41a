"""What README.md, docs/api.md and docs/compatibility.md promise and no other test holds, as far as it needs no model:
names and numbers against the code, figures against docs/benchmarks.md; links, flags, paths, commands of all pages."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from sglang_optimal import OptimalSampler, launch_server
from sglang_optimal.config import ALPHA_METHODS, LARGEST_FIXED_ALPHA, MAX_DRAFT_TOKENS, SETTINGS, MixingConfig
from sglang_optimal.names import ALL_SERIES, PROMPTS
from sglang_optimal.runtime import launch, plugin
from sglang_optimal.runtime.entrypoints.protocol import MIXING_FIELDS
from sglang_optimal.runtime.sampling.support import Support
from sglang_optimal.wanted import LARGEST_TOP_K

REPOSITORY = Path(__file__).parents[1]
README, API, COMPATIBILITY, BENCHMARKS = (
    (REPOSITORY / name).read_text()
    for name in ("README.md", "docs/api.md", "docs/compatibility.md", "docs/benchmarks.md")
)
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def section(text: str, heading: str) -> str:
    """From a heading to the next of its level or above."""
    level, _ = heading.split(" ", 1)
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def names(text: str) -> list[str]:
    """What stands as code in the first cells of the tables."""
    return [name for row in rows(text) for name in re.findall("`([^`]+)`", row[0])]


def flowing(text: str) -> str:
    return " ".join(text.split())


# -- every page: links, flags, paths, commands -----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@every_page
def test_links_and_anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("http")]
    for target in targets:
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def flags() -> set[str]:
    """Of the commands that the pages name."""
    from sglang.srt.server_args import ServerArgs

    from sglang_optimal.distill.cli import build_parser

    stock = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(stock)
    parsers = [stock, launch_server.mixing_parser(), launch_server.restart_parser(), build_parser()]
    parsers += [command for action in parsers[-1]._subparsers._group_actions for command in action.choices.values()]
    return {flag for parser in parsers for flag in parser._option_string_actions}


OF_OTHERS = {"--custom-generate-function-path", "--use-tis", "--no-deps", "--input-key", "--label-key"}
OF_OTHERS |= {"--apply-chat-template", "--apply-chat-template-kwargs"}
OF_OTHERS |= {"--gpus", "--ipc", "--array", "--cpus-per-task", "--gres", "--job-name", "--open-mode", "--requeue"}
OF_OTHERS |= {"--signal", "--time"}
OF_OTHERS |= {"--budget", "--plan"}
"""Flags of trainers, of pip, Docker and Slurm, and of the experiment under bench/proof."""


@every_page
def test_flags_exist(page):
    lines = [line for line in page.read_text().splitlines() if "sglang_router" not in line]
    # A name that ends in … is a family of flags.
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*+(?!…)", "\n".join(lines))) - OF_OTHERS
    assert named <= flags(), named - flags()


@every_page
def test_targets_and_paths_exist(page):
    text = page.read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`((?:tests|bench|configs|docs|frontend|sglang_optimal)/[\w/.-]*|test_\w+\.py)`", text):
        # Benchmarks make their folder of results.
        assert path == "bench/results/" or (REPOSITORY / path).exists() or list(REPOSITORY.glob(f"tests/**/{path}"))


@pytest.mark.parametrize("name", ["README.md", "docs/api.md", "docs/operations.md"])
def test_commands_are_understood(name, monkeypatch):
    """Up to where a model would be looked for. (The guide's are run by tests/server/test_guide.py.)"""
    from sglang_optimal.distill.cli import build_parser
    from sglang_optimal.distill.config import load_config

    monkeypatch.chdir(REPOSITORY)
    lines = re.findall(r"^ *(python -m sglang_optimal\..+)$", Path(name).read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        line = re.sub(r"\[([^\]]+)\]", r"\1", line.replace("[any SGLang flag]", ""))
        _, _, module, *argv = shlex.split(line)
        if module == "sglang_optimal.launch_server":
            launch_server.parse(argv)
        else:
            assert module == "sglang_optimal.distill"
            asked = build_parser().parse_args(argv)
            if getattr(asked, "config", "").startswith("configs/"):
                load_config(asked.config)


# -- docs/api.md: names and numbers ----------------------------------------------------------------------------------


def test_fields_and_series():
    assert sorted(names(section(API, "## The fields"))) == sorted(MIXING_FIELDS)
    assert tuple(names(section(API, "## What comes back").partition("### ")[0])) == ALL_SERIES
    for name in (*ALPHA_METHODS, *PROMPTS):
        assert f"`{name}`" in section(API, "## The fields"), name


def test_the_largest_answer():
    assert f"may be {LARGEST_TOP_K:,} at most".replace(",", " ") in section(API, "## What comes back")


def test_flags_and_routes_of_a_server(monkeypatch):
    from fastapi import FastAPI
    from sglang.srt.entrypoints import http_server

    from sglang_optimal.runtime.entrypoints import http_server as routes

    table = names(section(API, "## Running a server").partition("### ")[0])
    parsers = launch_server.mixing_parser(), launch_server.restart_parser()
    ours = {flag for parser in parsers for flag in parser._option_string_actions}
    assert {name for name in table if name.startswith("--")} == ours
    keys = {flag.removeprefix("--").replace("-", "_") for flag in ours - {"--config", "--max-restarts"}}
    assert keys == set(SETTINGS)

    stock, added = http_server.app, FastAPI()
    monkeypatch.setattr(http_server, "app", added)
    routes.install(MixingConfig())
    there = {
        f"{method} {route.path}"
        for route in (*stock.routes, *added.routes)
        for method in getattr(route, "methods", None) or ()
    }
    named = {name for name in table if " " in name}
    assert len(named) == 8 and named - there == {"GET /metrics"}  # comes with --enable-metrics


def test_metrics(monkeypatch):
    from sglang_optimal.runtime.observability import metrics_collector as metrics

    made = []

    class Metric:
        def __init__(self, name: str, text: str, labels: list[str], **more):
            made.append(name.removeprefix("sglang_optimal:") + getattr(self, "ending", ""))

        def labels(self, **labels) -> None:
            return None

    monkeypatch.setattr(metrics, "Counter", type("Counter", (Metric,), {"ending": "_total"}))
    monkeypatch.setattr(metrics, "Gauge", Metric)
    monkeypatch.setattr(metrics, "Histogram", Metric)
    metrics.MixingMetrics({}, None, None, "student")
    listed = names(section(API, "### Metrics"))
    assert sorted(listed) == sorted(["sglang_optimal:", *made])


def test_numbers():
    from sglang_optimal.runtime.managers.self_check import ALONE, EXACT, ROUNDED

    api, drafts = flowing(API), MixingConfig.DRAFT_TOKENS
    assert f"(`speculative`: {drafts['speculative']}), or at most (`auto`: {drafts['auto']})" in api
    assert f"; up to {MAX_DRAFT_TOKENS} |" in api
    assert "number up to 10⁶ in size" in api and LARGEST_FIXED_ALPHA == 10**6
    assert f"in float32 {EXACT} of what distinguishes" in api
    assert f"in 16 bits or fewer {ROUNDED} for most rows and {ALONE} for any" in api


@pytest.mark.parametrize("pool,count", [(6000, 7), (400, 6)])
def test_requests_of_the_self_check(pool, count):
    from sglang_optimal.runtime.managers.self_check import SelfCheck

    sized = SimpleNamespace(size=pool)
    runner = SimpleNamespace(sampling_observer=None, token_to_kv_pool_allocator=sized)
    model = SimpleNamespace(context_len=1024)
    worker = SimpleNamespace(
        model_runner=runner, guest_kv=sized, model_config=model, guest_context_len=1024, support=Support(64),
        mixing_config=MixingConfig(),
    )  # fmt: skip
    probes = SelfCheck(SimpleNamespace(tp_worker=worker))._requests()
    assert len(probes) == count
    assert {probe.alpha is None for probe in probes} == {True, False}
    assert "first answers seven random requests (six in very small pools)" in flowing(API)


# -- README.md and CONTRIBUTING.md: extras, versions, areas -----------------------------------------------------------


def test_extras_and_versions():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert sorted(names(section(README, "## Install"))) == sorted(project["optional-dependencies"])
    assert set(re.findall(r"'\.\[(\w+)\]'", README)) <= set(project["optional-dependencies"])
    (sglang,) = [one for one in map(Requirement, project["dependencies"]) if one.name == "sglang"]
    assert all(sglang.specifier.contains(release) for release in re.findall(r"SGLang (0\.\d+\.\d+)", README))
    assert set(re.findall(r"SGLang (0\.\d+\.\d+)", section(README, "## Install"))) == {"0.5.22", "0.5.23"}
    assert f"version {project['version']}}}" in section(README, "## Citation")


def test_the_index_names_every_page():
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    index = (REPOSITORY / "docs" / "README.md").read_text()
    assert {name for row in rows(index) for name in re.findall(r"\]\((\w+\.md)\)", row[0])} == pages
    assert set(re.findall(r"\]\(docs/(\w+\.md)\)", section(README, "## Docs"))) == {*pages, "README.md"}


def test_every_area_of_the_tests_has_a_row():
    listed = set(names(section((REPOSITORY / "CONTRIBUTING.md").read_text(), "## Tests")))
    folders = {f"tests/{path.name}" for path in (REPOSITORY / "tests").iterdir() if list(path.glob("test_*.py"))}
    assert listed == {*folders, "tests/test_*.py"}


# -- README.md: figures ----------------------------------------------------------------------------------------------


def median(cell: str) -> str:
    """Without the spread."""
    return cell.split(" ")[0]


def test_figures_of_the_limits():
    table = [row for row in rows(section(BENCHMARKS, "## Throughput beside the limits")) if len(row) == 13]
    head, measured = table[0], [row for row in table if row[0].isdigit()]
    m, shared = head.index("m/L"), head.index("shared/(2t/2)")
    (eight,) = [row for row in measured if row[:2] == ["8", "64"]]
    least = [min(median(row[column]) for row in measured) for column in (m, shared)]
    assert f"({median(eight[m])} and {median(eight[shared])} of them at batch 8; " in flowing(README)
    batches = f"batches of {measured[0][0]} to {measured[-1][0]}"
    assert f"at the least {least[0]} and {least[1]}, for {batches})" in flowing(README)
    (mixing,) = [row for row in rows(section(BENCHMARKS, "## A decode step")) if row[0] == "mixing"]
    shares = [float(share) for cell in mixing for share in re.findall(r"\(([\d.]+) %\)", cell)]
    assert len(shares) == 6 and f"{min(shares):.0f} to {max(shares):.0f} % of a step" in flowing(README)


def test_figures_of_the_drafts():
    auto = [row for row in rows(section(BENCHMARKS, "## Drafting")) if row[1] == "auto" and row[0] in ("1", "4")]
    assert [row[0] for row in auto] == ["1", "4"] * 2  # 3 blocks, then 4
    lockstep, teacher = ([median(row[column]) for row in auto] for column in (3, 4))
    assert (
        f"is {lockstep[0]} and {lockstep[2]} times as fast as lockstep for one client and {lockstep[1]} and "
        f"{lockstep[3]} times for four, {min(teacher)} to {max(teacher)} times as fast as the teacher alone"
    ) in flowing(README)


@pytest.mark.parametrize(
    "card,said",
    [
        ("H100", ("[{shares} % of the 7B's rate]", "for batches of {batches}, {limits} of L")),
        ("H200", ("on one H200 {shares} %, {limits} of L",)),
    ],
)
def test_figures_of_a_gpu(card, said):
    table = [row for row in rows(section(BENCHMARKS, f"### On an {card}")) if len(row) == 8]
    shares = sorted(round(100 * float(row[table[0].index("m/t")])) for row in table[2:])
    limits = sorted(median(row[table[0].index("m/L")]) for row in table[2:])
    assert len(shares) == 5
    figures = {"batches": [row[0] for row in table[2:]], "shares": shares, "limits": limits}
    ranges = {name: f"{values[0]} to {values[-1]}" for name, values in figures.items()}
    assert all(part.format(**ranges) in flowing(README) for part in said)


def test_figures_of_the_demo():
    solved = re.findall(r"(\d+)&#160;of&#160;12|(\d+) of 12", (REPOSITORY / "docs" / "demo.svg").read_text())
    _, student, mixture = [a or b for a, b in solved]
    assert f"The student alone solves {student} of 12 problems, the mixture {mixture}," in flowing(README)


# -- docs/compatibility.md: refused and handed on --------------------------------------------------------------------


@pytest.fixture
def models(tiny_pair) -> list[str]:
    return ["--model-path", str(tiny_pair[0]), "--student-model-path", str(tiny_pair[1])]


@pytest.mark.parametrize("flag,other", [("--sampling-backend", "pytorch"), ("--radix-cache-backend", "radix")])
def test_our_own_backends(models, flag, other):
    for student in (models, models[:2]):
        with pytest.raises(ValueError, match=f"^{flag}: must stay unset or 'optimal' beside a student, got '{other}'"):
            launch_server.parse([*student, flag, other])
        launch_server.parse([*student, flag, "optimal"])
    launch_server.parse([*models[:2], "--student-weights", "none", flag, other])
    assert f"`{flag}`" in section(COMPATIBILITY, "## Refused beside a student")


def changed(model: str, folder: Path, **config) -> str:
    """A copy of a model with other values in its configuration."""
    shutil.copytree(model, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(folder)


@pytest.mark.parametrize(
    "kind,architecture,model_type",
    [
        ("encoder-decoder", "WhisperForConditionalGeneration", "llama"),
        ("embedding", "LlamaEmbeddingModel", "llama"),
        ("recurrent", "FalconH1ForCausalLM", "falcon_h1"),
        ("recurrent", "FalconMambaForCausalLM", "falcon_mamba"),
    ],
)
@pytest.mark.parametrize("side", ["--model-path", "--student-model-path"])
def test_models(models, tmp_path, side, kind, architecture, model_type):
    number = models.index(side) + 1
    models[number] = changed(models[number], tmp_path / "other", architectures=[architecture], model_type=model_type)
    with pytest.raises(ValueError, match=f"^{side}: {architecture} is an? .*{kind}.* not supported beside a student"):
        launch.resolve(*launch_server.parse(models))


def test_models_with_a_pool_for_sliding_windows():
    """SGLang decides it by name."""
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    named = {"gpt-oss": "GptOss", "Llama 4": "Llama4", "Gemma 4": "Gemma4", "MiMo-V2": "MiMoV2Flash"}
    assert f"| {', '.join(named)}: sliding-window layers" in COMPATIBILITY
    for name in named.values():
        assert any(is_hybrid_swa_model([name + end]) for end in ("ForCausalLM", "ForConditionalGeneration")), name
    assert not is_hybrid_swa_model(["MistralForCausalLM"])


@pytest.mark.parametrize("arguments", [{}, {"enable_multimodal": False}], ids=str)
def test_a_multimodal_model(models, tmp_path, arguments):
    plugin.prepare()
    student = changed(models[3], tmp_path / "other", architectures=["Qwen2VLForConditionalGeneration"])
    config = MixingConfig.from_dict({"student_model_path": student})
    launch.checked_server_args(models[1], config, arguments, "OptimalSampler")


def test_what_applies_to_both_models(models):
    from sglang.srt.configs.model_config import ModelConfig

    from sglang_optimal.runtime.configs.model_config import guest_model_config

    argv = ["--dtype", "float16", "--context-length", "77", "--json-model-override-args", '{"rope_theta": 123.0}']
    server_args, config = launch_server.parse([*models, *argv])
    student = guest_model_config(server_args, config.guest_path, config.guest_revision)
    for model in (ModelConfig.from_server_args(server_args), student):
        assert (str(model.dtype), model.context_len, model.hf_config.rope_theta) == ("torch.float16", 77, 123.0)
    assert student.hf_config.num_hidden_layers == 1


# -- requests --------------------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "image_data": "a.png",
    "video_data": ["a.mp4"],
    "audio_data": "a.wav",
    "input_embeds": [[0.5, 0.5]],
    "session_params": {"id": "x"},
    "session_id": "x",
    "lora_path": "x",
    "watermark": {"key": 1},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_does_not_go_into_a_mixed_request(field):
    """A plain one on the same server may have it; an empty one is absent."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    from sglang_optimal.runtime.entrypoints.protocol import SideReader
    from sglang_optimal.runtime.managers.tokenizer_manager import _UNSUPPORTED, MixedTokenizerManager

    manager = SimpleNamespace(
        mixing_config=MixingConfig(student_model_path="s"),
        side_readers=dict.fromkeys(
            ("teacher", "student"),
            SideReader(str.encode, list, str.encode, vocab_size=64, context_length=100, max_chars=1000),
        ),
        _own_ids=lambda fields, text, ids: ids,
    )
    manager._check_plain = lambda obj: MixedTokenizerManager._check_plain(manager, obj)

    def prepare(value, custom):
        request = GenerateReqInput(text="a", sampling_params={"custom_params": custom}, **{field: value})
        MixedTokenizerManager._prepare_mixing(manager, request, "a", [9])

    mixed = {"student_input_ids": [9]}
    with pytest.raises(ValueError, match=f"^{field}: not supported in a mixed request; remove it or the student"):
        prepare(UNSUPPORTED[field], mixed)
    prepare(UNSUPPORTED[field], {"mine": 1})
    prepare([] if isinstance(UNSUPPORTED[field], list) else None, mixed)
    assert set(_UNSUPPORTED) - {"positional_embed_overrides", "multi_item_delimiter_indices"} == set(UNSUPPORTED)


@pytest.mark.parametrize(
    "last,continues",
    [
        ({"role": "assistant", "content": "so"}, True),
        ({"role": "user", "content": "so"}, False),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, False),
    ],
    ids=["assistant", "user", "call"],
)
def test_a_last_message_of_the_assistant_is_continued(monkeypatch, last, continues):
    """On /generate and in OptimalSampler, which both come here."""
    from sglang_optimal.runtime.entrypoints.openai.chat_side import ChatSide

    monkeypatch.setattr(ChatSide, "ids_of", lambda self, request, name: [request.continue_final_message])
    assert ChatSide(None).ids([{"role": "user", "content": "hi"}, last], "teacher_messages") == [continues]


def test_other_fields_of_the_offline_api():
    sampler = object.__new__(OptimalSampler)
    sampler._system_prompts, sampler._enable_chat_template, sampler._calls = (None, None), False, 0
    tokenizer = SimpleNamespace(encode=lambda text: [len(text)])
    sampler.engine = SimpleNamespace(tokenizer_manager=SimpleNamespace(tokenizer=tokenizer))
    request = sampler._request("aaa", "b", None, {"custom_params": {"return_prompts": True}, "alpha_max": 0.5}, {})
    (params,) = request.arguments["sampling_params"]
    assert request.arguments["input_ids"] == [[3]]
    assert params["custom_params"] == {
        "student_text": "b", "return_prompts": True, "alpha_max": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"grammar": "g"},
        {"custom_logit_processor": "p"},
        {"mixing": None},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"min_new_tokens": 1},
    ],
    ids=str,
)
def test_requests_that_take_one_token_a_step(change):
    """Where the guest drafts."""
    from sglang_optimal.runtime.speculative.spec_worker import can_draft

    params = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    request = {"grammar": None, "custom_logit_processor": None, "mixing": SimpleNamespace(guest="its side")}

    def drafted(change) -> bool:
        own = {name: change.get(name, value) for name, value in request.items()}
        asked = SimpleNamespace(**{name: change.get(name, value) for name, value in params.items()})
        return can_draft(SimpleNamespace(sampling_params=asked, **own))

    assert drafted({}) and not drafted(change)
