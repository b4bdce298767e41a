"""The examples of the README and docs/api.md, run as they stand but for the models' names and the server's address."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import SMALL

REPOSITORY = Path(__file__).parents[2]
PAGES = ("README.md", "docs/api.md")


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        text = (REPOSITORY / page).read_text()
        for i, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)):
            found.append(pytest.param(match[1], id=f"{page}-{i}"))
    return found


PYTHON = blocks("python")
OFFLINE = [block for block in PYTHON if "OptimalSampler(" in block.values[0]]
ONLINE = [block for block in PYTHON if block not in OFFLINE]
CURL = blocks("bash")


def run(code: str, folder: Path) -> str:
    script = folder / "example.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_examples():
    assert len(OFFLINE) >= 2 and len(ONLINE) >= 3 and len(CURL) >= 4


# Before the fixture starts the server: one engine at a time.
@pytest.mark.parametrize(
    "code", [OFFLINE[0], *(pytest.param(*code.values, marks=pytest.mark.slow, id=code.id) for code in OFFLINE[1:])]
)
def test_offline_example(tiny_pair, tmp_path, code):
    teacher, student = map(str, tiny_pair)
    arguments = ", ".join(f"{name}={value!r}" for name, value in SMALL.items())
    code, models = re.subn(r'"Qwen/[^"]*7B[^"]*", "Qwen/[^"]*"', f"{teacher!r}, {student!r}, {arguments}", code)
    assert models == 1
    assert re.search(r"0\.\d+", run(code, tmp_path))  # an alpha


@pytest.mark.parametrize("command", CURL)
def test_curl(client, tiny_pair, command):
    match = re.fullmatch(
        r"curl localhost:30000(\S+) -H 'Content-Type: application/json' -d '(.*)'\s*", command, re.DOTALL
    )
    assert match, command
    body = json.loads(match[2])
    if "model_path" in body:
        body["model_path"] = str(tiny_pair[1])
    response = client.post(match[1], json=body)
    assert response.status_code == 200, response.text
    assert '"alpha"' in response.text or response.json()["success"] is True


@pytest.mark.parametrize("code", ONLINE)
def test_online_example(client, tmp_path, code):
    assert "localhost:30000" in code
    output = run(code.replace("http://localhost:30000", str(client.base_url).rstrip("/")), tmp_path)
    assert re.search(r"\[0\.\d+", output), output  # alphas
