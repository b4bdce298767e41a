"""A run that starts its own server: it restarts one that dies, and takes it with it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from harness import SMALL

from sglang_optimal.distill.store import find_shards, read_rows


def settings(pair, tmp_path, **server):
    lines = [json.dumps({"problem": f"{i}?", "answer": "x"}) + "\n" for i in range(12)]
    (tmp_path / "problems.jsonl").write_text("".join(lines))
    content = {
        "data": {"path": str(tmp_path / "problems.jsonl")},
        "contexts": {"student": "{problem}", "strategies": [{"teacher": "{problem} {answer}"}]},
        "sampling": {"n": 8, "max_new_tokens": 96},
        "client": {"concurrency": 4},
        "mixing": {"student_model_path": str(pair[1])},
        "server": {"model_path": str(pair[0]), **SMALL, **server},
        "output": {"dir": str(tmp_path / "out")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return [sys.executable, "-m", "sglang_optimal.distill", "run", str(tmp_path / "run.yaml"), "--no-report"]


def servers_of(out: Path) -> list[int]:
    """Processes that were started with this run's server.yaml."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(out / "server.yaml") in command:
                found.append(int(entry.name))
    return found


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def records(out: Path) -> list[dict]:
    return [row for kind in ("accepted", "rejected") for row in read_rows(find_shards(out, kind))]


@pytest.mark.slow  # two starts of a server; tests/distill/test_run.py has servers that die, without an engine
def test_it_is_restarted_and_goes_with_the_run(tiny_pair, tmp_path):
    out = tmp_path / "out"
    command = settings(tiny_pair, tmp_path)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (out / "run.json").exists() and len(records(out)) >= 8, 120)
        first = servers_of(out)
        assert first
        os.kill(min(first), signal.SIGKILL)
        output, error = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, error
    rows = records(out)
    assert len(rows) == len({row["id"] for row in rows}) == 96
    starts = re.findall(r"The server is fired up", (out / "server.log").read_text(errors="replace"))
    assert len(starts) == 2
    wait_for(lambda: not servers_of(out), 20)
    assert "96 accepted" in output


def test_what_the_server_says_when_it_cannot_start(tiny_pair, tmp_path):
    command = settings(tiny_pair, tmp_path, no_such_flag=1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "the server ended with status 2" in done.stderr and "'no_such_flag'" in done.stderr


@pytest.mark.slow  # a start of a server; tests/distill/test_one_model.py has the rest, without an engine
def test_the_student_alone_takes_a_server_of_its_own(tiny_pair, tmp_path):
    """What it reads and says is what transformers has for the student: prompts rendered with its template, and
    log-probabilities at the request's temperature, before top-p."""
    command = settings(tiny_pair, tmp_path)
    content = yaml.safe_load((tmp_path / "run.yaml").read_text())
    content["mixing"] |= {"fixed_alpha": 0}
    content["sampling"] = {"n": 2, "max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    content["contexts"]["student"] = {"system": "Be brief.", "user": "{problem}", "assistant": "Well,"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the student alone runs, one forward pass a token" in done.stderr
    rows = records(tmp_path / "out")
    assert len(rows) == 24
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_pair[1], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_pair[1])
    for row in rows:
        assert row["student_model"] == str(tiny_pair[1]) and row["teacher_model"] is None
        rendered = tokenizer.apply_chat_template(row["student_messages"], continue_final_message=True, tokenize=False)
        prompt, drawn = row["student_prompt_ids"], row["token_ids"]
        assert prompt == tokenizer.encode(rendered, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, -1)[range(len(drawn)), drawn].tolist()
        assert row["student_logprob"] == pytest.approx(expected, abs=1e-4)
        assert row["teacher_logprob"] == [] and row["alpha"] == [0.0] * len(drawn)
    assert len({row["text"] for row in rows}) > 12
