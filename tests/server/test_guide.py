"""Every block of docs/distillation_guide.md, run in its order in one folder, on tiny models."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import SMALL

from sglang_optimal.distill.cli import main
from sglang_optimal.distill.config import parse_config
from sglang_optimal.launch_server import parse

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs" / "distillation_guide.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def test_the_guide(client, tiny_pair, tmp_path, monkeypatch):
    """The server's address and the models' names are ours; the rest is as it stands there."""
    monkeypatch.chdir(tmp_path)
    port = str(client.base_url.port)
    ran = set()

    def ours(text: str) -> str:
        text = text.replace("Qwen/Qwen2.5-7B-Instruct", str(tiny_pair[0]))
        text = text.replace("Qwen/Qwen2.5-1.5B-Instruct", str(tiny_pair[1]))
        return text.replace("30000", port)

    for language, name, code in BLOCKS:
        code = ours(code)
        ran.add((language, bool(name)))
        if name == "run.yaml":
            # A random model never comes to the answer; every second sample is taken instead.
            Path("every_second.py").write_text(
                "def sample(record):\n    return int(record.id.rsplit('/')[-1]) % 2 == 0 or 'an odd number'\n"
            )
            values = yaml.safe_load(code)
            parse_config(values)
            values["filters"] = [{"type": "function", "function": "every_second:sample"}]
            values["sampling"]["temperature"] = 1.0
            Path(name).write_text(yaml.safe_dump(values))
        elif name.endswith((".jsonl", ".py", ".yaml")):
            Path(name).write_text(code)
        elif language == "yaml":
            values = yaml.safe_load(Path("run.yaml").read_text())
            parse_config({**values, **yaml.safe_load(code)})
        elif language == "sh":
            for line in code.strip().splitlines():
                words = shlex.split(line)
                assert words[:2] == ["python", "-m"]
                if name == "server":  # one server at a time: its arguments are checked, and the client's is running
                    parse([*words[3:], *as_flags(SMALL)])
                elif name == "own":  # tests/distill/test_own_server.py starts one
                    assert words[2] == "sglang_optimal.distill" and words[3:] == ["run", "run.yaml"]
                else:
                    assert words[2] == "sglang_optimal.distill"
                    # A random model's texts seldom have the tokens that were sampled.
                    keep = ["--on-mismatch", "keep"] if words[3] == "export" else []
                    assert main([*words[3:], *keep]) == 0, line
        elif language == "python":
            code = code.replace('report_to="none"', 'report_to="none", max_steps=1, use_cpu=True, bf16=False')
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, code + done.stdout + done.stderr
        elif language == "bash":
            match = re.fullmatch(r"curl \S+(/\w+) -H 'Content-Type: application/json' -d '(.*)'\s*", code, re.DOTALL)
            body = match[2].replace("checkpoints/", f"{tmp_path}/checkpoints/")  # the server runs in another folder
            response = client.post(match[1], content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == 200, response.text
        else:
            pytest.fail(f"a block in {language}: nobody runs it")
    assert {language for language, _ in ran} == {"jsonl", "yaml", "sh", "python", "bash"}
    assert "my_filters.py" in {name for _, name, _ in BLOCKS}
    for name in ("runs/first/report.html", "runs/first/train.parquet", "runs/round-2/README.md", "schema.json"):
        assert Path(name).exists(), name
    client.post("/update_student_weights_from_disk", json={"model_path": str(tiny_pair[1])}).raise_for_status()


def as_flags(values: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in values.items()]


def test_links_and_anchors():
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", GUIDE):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        page = REPOSITORY / "docs" / file if file else None
        assert page is None or page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text() if page else GUIDE, re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], text


def test_every_filter_and_format_is_there():
    from sglang_optimal.distill.export import FORMATS
    from sglang_optimal.distill.filters import FILTERS

    for name in (*FILTERS, *FORMATS):
        assert f"`{name}`" in GUIDE, name
