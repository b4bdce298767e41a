"""docs/training.md: its examples are run, its tables hold what is there."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_sampler import FakeSampler
from tiny_models import build_tiny_tokenizer_model

from sglang_optimal import train
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.store import RecordStore
from sglang_optimal.train import LOSSES, Objective

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
MODULES = [m.name for m in pkgutil.iter_modules(train.__path__, "sglang_optimal.train.")]


def examples() -> list[doctest.DocTest]:
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        names = {**vars(train), **vars(module), "torch": torch}
        found += [test for test in doctest.DocTestFinder().find(module, name, globs=names) if test.examples]
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_docstring(example):
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_page_s_examples():
    """One after the other, as one program, in which each section's loss is called."""
    names: dict = {}
    code = [block for language, name, block in BLOCKS if language == "python" and not name]
    assert len(code) >= 8
    for block in code:
        parsed = doctest.DocTestParser().get_doctest(block, names, "training.md", None, None)
        assert parsed.examples
        assert doctest.DocTestRunner().run(parsed, clear_globs=False).failed == 0
        names = parsed.globs
    called = "".join(code)
    for name in (
        "forward_kl",
        "reverse_kl",
        "generalised_jsd",
        "mixture_kl",
        "divergence_bounds",
        "policy_gradient_loss",
    ):
        assert f"{name}(" in called


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("page-pair")
    return tuple(
        build_tiny_tokenizer_model(root / name, seed=i, hidden_size=32, num_layers=1)
        for i, name in ((1, "t"), (2, "s"))
    )


def run(name: str, pair, folder: Path, prelude: str = "") -> None:
    """A block as a program, but for the models' names and the device."""
    (code,) = [block for language, title, block in BLOCKS if language == "python" and title == name]
    code = code.replace("Qwen/Qwen2.5-7B-Instruct", str(pair[0])).replace("Qwen/Qwen2.5-1.5B-Instruct", str(pair[1]))
    code = code.replace('report_to="none"', 'report_to="none", use_cpu=True, disable_tqdm=True')
    script = folder / "example.py"
    script.write_text(prelude + code)
    path = os.pathsep.join([str(Path(__file__).parent), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_records(pair, tmp_path):
    """On a run's own shards."""
    store = RecordStore(tmp_path / "runs" / "first")
    results = FakeSampler(*pair).generate(
        ["what is 3 + 4? it is 7"] * 4, ["what is 3 + 4?"] * 4, temperature=0.8, return_mixing_info=True
    )
    series = ("alpha", "teacher_logprob", "student_logprob", "mixture_logprob", "kl_to_student")
    for i, result in enumerate(results):
        store.append(
            Record(
                id=f"p{i}/default/0", problem_id=f"p{i}", strategy="default", sample_index=0, fields={"problem": "p"},
                teacher_context="t", student_context="s", text="x", finish_reason="length", token_ids=result.token_ids,
                student_prompt_ids=result.meta_info["student_prompt_ids"], sampling={"temperature": 0.8},
                **{name: result.mixing_info[name] for name in series},
            )
        )  # fmt: skip
    store.finalize()
    store.write_json(store.manifest_path, {"state": "complete"})
    store.close()
    run("records", pair, tmp_path)
    assert json.loads((tmp_path / "checkpoints/round-1/config.json").read_text())["vocab_size"] == 64


def test_rollouts(pair, tmp_path):
    """With the sampler that needs no engine; test_trainers.py has one that does."""
    fake = "import sglang_optimal, fake_sampler; sglang_optimal.OptimalSampler = fake_sampler.FakeSampler\n"
    run("rollouts", pair, tmp_path, fake)


def test_grpo(pair, tmp_path):
    fake = "import sglang_optimal, fake_sampler; sglang_optimal.OptimalSampler = fake_sampler.FakeSampler\n"
    run("grpo", pair, tmp_path, fake)


def test_in_a_trainer_of_one_s_own(pair):
    """What the block's class computes is the loss of the records at their completions."""
    from transformers import AutoModelForCausalLM

    names: dict = {}
    exec(next(block for _, title, block in BLOCKS if title == "own"), names)
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    ids = torch.tensor([[5, 6, 7, 8]])
    teacher = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    target = train.TopK.from_logits(teacher, 64)
    inputs = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 7, 8]]), "target": target}
    found = names["TopKTrainer"].compute_loss(None, model, inputs)
    expected = train.forward_kl(model(ids).logits[:, 1:3], teacher[:, 1:])
    torch.testing.assert_close(found, expected)


# -- tables ------------------------------------------------------------------------------------------------------------


def cells(heading: str) -> list[list[str]]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]


def test_every_loss_has_a_row():
    assert [row[0].strip("`") for row in cells("Which loss")[2:]] == list(LOSSES)


def test_every_argument_has_a_row(tmp_path):
    from transformers import TrainingArguments

    from sglang_optimal.train import TrainConfig

    ours = set(TrainConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    named = {name for row in cells("Training on records")[2:] for name in re.findall(r"`(\w+)`", row[0])}
    assert ours - {"update_every"} == named
    assert "`update_every`" in PAGE.partition("## Training on rollouts")[2]


def test_the_columns_that_losses_read_are_on_the_page():
    listed = " ".join(row[0] for row in cells("The objects"))
    for loss in LOSSES:
        assert all(f"`{name}`" in listed for name in Objective(loss).series)
        for column in Objective(loss).top_k or ():
            sides = re.fullmatch(r"top_k_([a-z]+)(?:_([a-z]+))?_(ids|logprobs|tail)", column)
            assert sides and f"`top_k_X{'_Y' if sides[2] else ''}_{sides[3]}`" in listed
    # Those of a record are named as records have them.
    from sglang_optimal.distill.records import COLUMNS

    stored = {name for name in re.findall(r"`(\w+)`", listed) if "top_k" not in name and name != "behaviour_logprob"}
    assert {*stored} - {"teacher", "student", "mixture"} <= set(COLUMNS)


def test_the_main_functions_have_an_example():
    named = {example.name.rpartition(".")[2] for example in examples()}
    assert {"forward_kl", "reverse_kl", "generalised_jsd", "divergence_bounds", "importance_weights"} <= named
    assert "policy_gradient_loss" in named
