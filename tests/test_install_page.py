"""docs/install.md: its commands against the package's requirements, what a wheel holds, its tables of models."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from stub_server import stub_server
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from sglang_optimal import launch_server

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
GIB, GB, SHARE = 2**30, 10**9, 0.85


def table(heading: str, first: str) -> list[dict[str, str]]:
    """Rows of the table under a heading whose first column has this name."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    start = next(i for i, cells in enumerate(lines) if cells[0] == first)
    rows = []
    for cells in lines[start + 2 :]:
        if len(cells) != len(lines[start]):
            break
        rows.append(dict(zip(lines[start], cells, strict=True)))
    return rows


# -- commands --------------------------------------------------------------------------------------------------------


def needed(extra: str | None = None) -> set[str]:
    return set(PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])


def of_sglang() -> set[str]:
    return {Requirement(text).name for text in importlib.metadata.requires("sglang") if "extra ==" not in text}


def installed_by(line: str) -> set[str]:
    return {word for word in shlex.split(line) if not word.startswith("-")} - {"RUN", "pip", "install", "."}


def lines_with(text: str) -> list[str]:
    return [line for line in PAGE.splitlines() if "pip install" in line and text in line]


def test_sglang_s_image_lacks_what_the_page_installs_and_nothing_else():
    """What SGLang's own requirements bring is not named: a second copy would be another version."""
    ours = {text for text in needed() | needed("distill") if Requirement(text).name != "sglang"}
    brought = of_sglang()
    (line,) = lines_with("RUN pip install '")
    assert installed_by(line) == {text for text in ours if Requirement(text).name not in brought}
    assert {Requirement(text).name for text in needed()} - brought == {"sglang", "pyyaml"}
    (image,) = re.findall(r"^FROM lmsysorg/sglang:v(\S+)$", PAGE, re.MULTILINE)
    (sglang,) = [Requirement(text) for text in needed() if Requirement(text).name == "sglang"]
    assert sglang.specifier.contains(image) and re.findall(r"0\.5\.\d+", PAGE.split("| SGLang |")[1][:40])


def test_a_machine_that_only_talks_to_a_server():
    (line,) = lines_with("pip install transformers packaging")
    ours = {text for text in needed() | needed("distill") if Requirement(text).name not in ("sglang", "numba")}
    assert installed_by(line) == ours | {"transformers"}


def test_extras():
    rows = table("By extras", "you want")
    named = {extra for row in rows for group in re.findall(r"'\.\[([\w,]+)\]'", row["command, in a clone"]) for extra in
             group.split(",")}  # fmt: skip
    assert named == set(PROJECT["optional-dependencies"])
    assert "'.[demo,distill,train,dev]'" in (REPOSITORY / "Makefile").read_text()


def test_python_and_system():
    assert f"| Python | {PROJECT['requires-python'].removeprefix('>=')} or newer." in PAGE
    assert "Operating System :: POSIX :: Linux" in PROJECT["classifiers"]


@pytest.fixture
def without(tmp_path):
    """Runs code where these are not installed: among links to what is, theirs lack."""

    def run(names: set[str], code: str, *argv: str) -> subprocess.CompletedProcess:
        there = tmp_path / "site-packages"
        there.mkdir(exist_ok=True)
        for path in Path(torch.__file__).parents[1].iterdir():
            name = re.split(r"[-.]", path.name)[0].lower()
            if name not in names and path.suffix != ".pth" and not (there / path.name).exists():
                (there / path.name).symlink_to(path)
        environment = {**os.environ, "PYTHONPATH": f"{there}:{REPOSITORY}"}
        command = [sys.executable, "-S", "-c", code, *argv]  # -S: the real folder is not looked at
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    return run


def test_a_run_needs_neither_sglang_nor_pytorch(tmp_path, without):
    (tmp_path / "problems.jsonl").write_text(
        '{"problem": "1 + 1?", "answer": "2"}\n{"problem": "1 + 0?", "answer": "1"}\n'
    )
    settings = {
        "data": {"path": str(tmp_path / "problems.jsonl")},
        "contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]},
        "filters": [{"type": "answer", "match": "math"}],
        "output": {"dir": str(tmp_path / "out")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    absent = {"sglang", "torch", "torchvision", "torchaudio", "numba", "triton"}
    code = "import sys\nfrom sglang_optimal.distill.cli import main\nsys.exit(main(sys.argv[1:]))"
    assert without(absent, "import torch").returncode == 1
    assert without(absent, code, "preview", str(tmp_path / "run.yaml")).returncode == 0
    with stub_server() as stub:
        done = without(absent, code, "run", str(tmp_path / "run.yaml"), "--endpoint", stub.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "report.html").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["state"] == "complete"


def test_the_mathematics_needs_pytorch_and_numba_alone(without):
    absent = {
        "sglang",
        "pydantic",
        "pydantic_core",
        "yaml",
        "pyyaml",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "pyarrow",
    }
    absent |= {"fastapi", "tenacity", "rich", "httpx", "matplotlib", "transformers", "triton", "orjson", "zmq"}
    code = """
import torch
from sglang_optimal.mixing import AlphaParams, mix
from sglang_optimal.train import forward_kl
rows = torch.randn(2, 8)
print(mix(rows[:1], rows[1:], torch.ones(1), AlphaParams.uniform(1)).alpha.item())
"""
    done = without(absent, code)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 1


def test_the_container_s_command():
    (command,) = re.findall(r"^docker run (.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    _, _, server = command.replace("\\\n", " ").partition("python3 -m sglang_optimal.launch_server ")
    launch_server.parse(shlex.split(server))


LEFT_OUT = ("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `pip install --no-deps .` builds it, with the setuptools that is there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "sglang_optimal", source / "sglang_optimal", ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_a_wheel_holds_all_of_the_package(wheel):
    """Modules, templates and pages, the entry points that make SGLang find it; nothing but the package."""
    names = set(wheel.namelist())
    files = [path for path in (REPOSITORY / "sglang_optimal").rglob("*") if path.is_file()]
    listed = [str(path.relative_to(REPOSITORY)) for path in files if not any(map(path.match, LEFT_OUT))]
    listed = [name for name in listed if "__pycache__" not in name]
    assert listed and set(listed) <= names
    (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert {name.partition("/")[0] for name in names} == {"sglang_optimal", info}
    entries = wheel.read(f"{info}/entry_points.txt").decode()
    assert "sglang.srt.plugins" in entries and "sglang.srt.platforms" in entries and "sglang-optimal-distill" in entries


# -- models ----------------------------------------------------------------------------------------------------------

MODELS = {row["model"]: row for row in table("Model pairs and memory", "model")}
CARDS = {  # billions of parameters as the models' cards say; None: not said
    "SmolLM2-135M": 0.135, "Qwen2.5-0.5B": 0.49, "Qwen2.5-1.5B": 1.54, "Qwen2.5-7B": 7.61, "Qwen2.5-14B": 14.7,
    "Qwen3-0.6B": 0.6, "Qwen3-1.7B": 1.7, "Qwen3-4B": 4.0, "Qwen3-8B": 8.2,
}  # fmt: skip


def parameters(name: str) -> int:
    """Counted by transformers, on a model without memory."""
    row = MODELS[name]
    family = {"SmolLM2": LlamaConfig, "Qwen2.5": Qwen2Config, "Qwen3": Qwen3Config}[name.split("-")[0]]
    config = family(
        vocab_size=int(row["vocabulary"]),
        hidden_size=int(row["hidden"]),
        intermediate_size=int(row["FFN"]),
        num_hidden_layers=int(row["layers"]),
        num_attention_heads=int(row["heads"]),
        num_key_value_heads=int(row["KV heads"]),
        head_dim=int(row["head size"]),
        tie_word_embeddings=row["tied"] == "yes",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def kv_bytes(name: str) -> int:
    row = MODELS[name]
    return int(row["layers"]) * 2 * int(row["KV heads"]) * int(row["head size"]) * 2


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    count = parameters(name)
    assert MODELS[name]["parameters"] == f"{count / 1e9:.3f} B"
    assert count / 1e9 == pytest.approx(CARDS[name], rel=0.015)
    assert MODELS[name]["KV a token, kB"] == f"{kv_bytes(name) / 1000:.1f}"


PAIRS = table("Model pairs and memory", "teacher")


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: f"{row['teacher']}, {row['student']}")
def test_a_pair(row):
    shared = row["student"] == "the same, shared weights"
    teacher, student = row["teacher"], row["teacher"] if shared else row["student"]
    counts = [parameters(teacher), parameters(student)]
    weights = 2 * (counts[0] if shared else sum(counts))
    kv = kv_bytes(teacher) + kv_bytes(student)
    assert row["weights, GB"] == f"{weights / GB:.1f}" and row["KV a token, kB"] == f"{kv / 1000:.1f}"
    for column, size in (("tokens on 24 GiB", 24), ("on 80 GiB", 80)):
        tokens = int((SHARE * size * GIB - weights) / kv) // 1000 * 1000
        assert row[column] == (f"{tokens:,}" if tokens > 0 else "does not fit"), (column, tokens)
    assert row["work a token, of the teacher's"] == f"{1 + counts[1] / counts[0]:.2f}"


def test_there_are_models_and_pairs():
    assert set(CARDS) == set(MODELS) and len(PAIRS) >= 6
    assert {row["teacher"] for row in PAIRS} <= set(MODELS)
    assert f"({SHARE} × the card − weights) / KV a token" in PAGE and f"`--mem-fraction-static {SHARE}`" in PAGE


def test_the_one_figure_that_was_measured():
    """It is README.md's, which is compared with docs/benchmarks.md."""
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    low, high = re.search(r"a 7B with a 1\.5B has (\d+) to (\d+) % of the 7B's own rate", PAGE).groups()
    h100 = re.search(r"gives \[(\d+) to (\d+) % of the 7B's rate\]", readme).groups()
    h200 = re.search(r"on one H200 (\d+) to (\d+) %", readme).groups()
    assert (int(low), int(high)) == (min(map(int, h100 + h200)), max(map(int, h100 + h200)))
