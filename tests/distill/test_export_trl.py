"""TRL's own trainers take a step on exports, and read what was read and sampled."""

from __future__ import annotations

import datasets
import pytest
import torch
from tiny_models import build_tiny_tokenizer_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_optimal.distill.export import export
from sglang_optimal.distill.records import Record
from sglang_optimal.distill.store import RecordStore

QUESTION = [{"role": "user", "content": "what is 3 + 4?"}]
STEP = {
    "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True,
    "bf16": False, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_tokenizer_model(tmp_path_factory.mktemp("tiny") / "model", seed=0, hidden_size=32, num_layers=1)


def run_of(path, folder, context=QUESTION, texts=(("it is 7", True), ("it is 8", False))):
    """Two problems; each has an accepted and a rejected sample, with the ids that a server would have."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = isinstance(context, str)
    prompt = tokenizer(context)["input_ids"] if plain else None
    prompt = prompt or tokenizer.apply_chat_template(context, return_dict=False, add_generation_prompt=True)
    store = RecordStore(path)
    for i, (k, (text, accepted)) in ((i, sample) for i in range(2) for sample in enumerate(texts)):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        store.append(
            Record(
                f"p{i}/s/{k}", f"p{i}", "s", k, {}, context, context, text, ids, "stop", student_prompt_ids=prompt,
                models={"student_model": str(folder)}, accepted=accepted, rejected_by=None if accepted else "answer",
            )
        )  # fmt: skip
    store.finalize()
    store.write_json(store.manifest_path, {"state": "complete"})
    store.close()
    return path


def exported(run, output, format, **more):
    done = export(run, output, format, **more)
    assert not done.differing
    return datasets.load_dataset("parquet", data_files=str(output))["train"]


def models(folder, count=1):
    made = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(count)]
    return [*made, AutoTokenizer.from_pretrained(folder)]


def takes_a_step(trainer):
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    result = trainer.train()
    assert result.global_step == 1 and torch.isfinite(torch.tensor(result.training_loss))
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())


def ids_of(folder, context, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("context", [QUESTION, "what is 3 + 4? "])
def test_dpo(tmp_path, folder, context):
    from trl import DPOConfig, DPOTrainer

    rows = exported(run_of(tmp_path / "run", folder, context), tmp_path / "out.parquet", "trl-dpo", columns=["id"])
    model, tokenizer = models(folder)
    trainer = DPOTrainer(
        model, args=DPOConfig(str(tmp_path / "trained"), **STEP), train_dataset=rows, processing_class=tokenizer
    )
    for name, text in (("chosen_ids", "it is 7"), ("rejected_ids", "it is 8")):
        assert trainer.train_dataset[name] == [ids_of(folder, context, text)] * 2
    takes_a_step(trainer)


@pytest.mark.parametrize("context", [QUESTION, "what is 3 + 4? "])
def test_kto(tmp_path, folder, context):
    from trl import KTOConfig, KTOTrainer

    rows = exported(run_of(tmp_path / "run", folder, context), tmp_path / "out.parquet", "trl-kto")
    model, tokenizer = models(folder)
    trainer = KTOTrainer(
        model, args=KTOConfig(str(tmp_path / "trained"), **STEP), train_dataset=rows, processing_class=tokenizer
    )
    right, wrong = (ids_of(folder, context, text) for text in ("it is 7", "it is 8"))
    assert trainer.train_dataset["label"] == [True, True, False, False]
    assert trainer.train_dataset["completion_ids"] == [right, right, wrong, wrong]
    takes_a_step(trainer)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize("context", [QUESTION, "what is 3 + 4? "])
def test_gkd(tmp_path, folder, context, lmbda):
    """Off policy on the sample, on policy after the very prompt."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    run = run_of(tmp_path / "run", folder, context)
    rows = exported(run, tmp_path / "out.parquet", "trl-gkd")
    model, teacher, tokenizer = models(folder, 2)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(0.5)  # a teacher that says something else
    trainer = GKDTrainer(
        model, teacher, args=GKDConfig(str(tmp_path / "trained"), lmbda=lmbda, max_new_tokens=4, **STEP),
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    sample = ids_of(folder, context, "it is 7")
    length = len(rows[0]["input_ids"]) - len(sample)
    assert batch["input_ids"].tolist() == rows["input_ids"]
    assert batch["labels"].tolist() == [[-100] * length + sample] * 2
    assert batch["prompts"].tolist() == [rows[0]["input_ids"][:length]] * 2
    takes_a_step(trainer)


def test_gkd_would_render_no_template_variables(tmp_path, folder):
    """Which is why the export has ids: its collator makes another prompt of the messages alone."""
    from trl.experimental.utils import DataCollatorForChatML

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if thinking %}9{% else %}8{% endif %}"
    )
    store = RecordStore(tmp_path / "run")
    prompt = tokenizer.apply_chat_template(QUESTION, return_dict=False, thinking=True)
    store.append(
        Record(
            "p/s/0", "p", "s", 0, {}, QUESTION, QUESTION, "7", [20], "stop", student_prompt_ids=prompt,
            sampling={"student_chat_template_kwargs": {"thinking": True}},
        )
    )  # fmt: skip
    store.finalize()
    store.write_json(store.manifest_path, {"state": "complete"})
    store.close()
    row = exported(tmp_path / "run", tmp_path / "out.parquet", "gkd")[0]
    collate = DataCollatorForChatML(tokenizer)
    assert collate([row])["prompts"].tolist() == [prompt]
    assert collate([{"messages": row["messages"]}])["prompts"].tolist() != [prompt]
