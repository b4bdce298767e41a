"""Both trainers on tiny models: what they read, what they minimise, what the sampler gets."""

from __future__ import annotations

import json
import math
import types

import datasets
import pytest
import torch
from fake_sampler import VOCAB, FakeSampler
from safetensors.torch import load_file
from tiny_models import build_tiny_tokenizer_model, small_ids
from transformers import AutoModelForCausalLM

from sglang_optimal.top_k import ARRAYS
from sglang_optimal.train import (
    LOSSES,
    Objective,
    RecordCollator,
    RecordTrainer,
    RolloutTrainer,
    TopK,
    TrainConfig,
    mixture_kl,
    reverse_kl,
    sampled_logprobs,
)
from sglang_optimal.train.sampler import give_weights

TEACHER_PROMPTS = ["what is 2 + 3? it is 5.", "a colour? red"]
STUDENT_PROMPTS = ["what is 2 + 3?", "a colour?"]
TEMPERATURE = 0.8
SIZE = {"hidden_size": 32, "num_layers": 1, "logit_std": 1.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Teacher and student; the student's vocabulary is padded to 80."""
    root = tmp_path_factory.mktemp("train-pair")
    teacher = build_tiny_tokenizer_model(root / "teacher", seed=1, **SIZE)
    return teacher, build_tiny_tokenizer_model(root / "student", seed=2, vocab_size=80, **SIZE)


@pytest.fixture(scope="module")
def records(pair) -> datasets.Dataset:
    """512 records of four tokens, as `distill` stores them, with top-k arrays."""
    results = FakeSampler(*pair, top_k=24).generate(
        TEACHER_PROMPTS, STUDENT_PROMPTS, n=256, temperature=TEMPERATURE, return_mixing_info=True, seed=5
    )
    sampling = json.dumps({"temperature": TEMPERATURE, "max_new_tokens": 4})
    return datasets.Dataset.from_list(
        [
            {
                "id": f"p{i}", "token_ids": result.token_ids, **result.meta_info, **result.mixing_info,
                "sampling": sampling,
            }
            for i, result in enumerate(results)
        ]
    )  # fmt: skip


def student(pair):
    return AutoModelForCausalLM.from_pretrained(pair[1])


def config(tmp_path, **settings) -> TrainConfig:
    defaults = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 16, "learning_rate": 3e-3,
        "num_train_epochs": 4, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "logging_steps": 1, "vocab_size": VOCAB, "seed": 1,
    }  # fmt: skip
    return TrainConfig(**{**defaults, **settings})


@torch.no_grad()
def distance(model, records, divergence: str = "mixture_kl") -> float:
    """Mean KL(q*‖student), q* as it was, or KL(student‖teacher), over the records' prefixes and 24 of 64 tokens."""
    batch = RecordCollator(Objective(divergence))(list(records)[::8])
    length = batch["token_ids"].shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model.eval()(**inputs).logits[:, -length - 1 : -1, :VOCAB]
    target = TopK(batch["top_k_ids"], batch["top_k_logprobs"], batch["top_k_tail"])
    loss = {"mixture_kl": mixture_kl, "reverse_kl": reverse_kl}[divergence]
    return loss(logits, target, temperature=TEMPERATURE).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_brings_the_student_nearer_to_the_mixture(pair, records, tmp_path, loss):
    """And to the teacher, which q* lies towards; what goes on to the teacher would leave q* behind."""
    model = student(pair)
    before = distance(model, records), distance(model, records, "reverse_kl")
    steps = 8 if loss == "reverse_kl" else 24
    settings = {"per_device_train_batch_size": 64, "learning_rate": 1e-3, "max_steps": steps}
    trainer = RecordTrainer(model, config(tmp_path, loss=loss, **settings), records)
    assert trainer.train().global_step == steps
    after = distance(model, records), distance(model, records, "reverse_kl")
    assert before[0] > 0.2 and after[0] < (0.7 if loss == "mixture_kl" else 0.96) * before[0], (before, after)
    assert before[1] > 1 and after[1] < 0.85 * before[1], (before, after)
    seen = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == steps and all(math.isfinite(entry["loss"]) for entry in seen)
    weighted = loss in ("importance_sft", "policy_gradient")
    assert all(("ess_ratio" in entry) == ("clipped" in entry) == weighted for entry in seen)


def test_weights_towards_the_student_that_sampled_leave_it_where_it_is(pair, records, tmp_path):
    """In expectation its own samples teach it nothing: the gradient is far smaller than towards the teacher."""
    norms = {}
    for side in ("student", "teacher"):
        settings = {"loss": "importance_sft", "weights_towards": side, "per_device_train_batch_size": 512}
        trainer = RecordTrainer(student(pair), config(tmp_path, max_steps=1, max_weight=None, **settings), records)
        trainer.train()
        norms[side] = trainer.state.log_history[0]["grad_norm"]
    assert norms["student"] < 0.7 * norms["teacher"], norms


# -- what a batch is ---------------------------------------------------------------------------------------------------


def test_logits_are_those_of_each_record_alone(pair, tmp_path):
    """However long the others are: the loss of a padded batch is that of the records one by one."""
    rows = [
        {"prompt_ids": small_ids("hello there"), "completion_ids": small_ids("you")},
        {"prompt_ids": small_ids("a"), "completion_ids": small_ids("longer text")},
        {"prompt_ids": small_ids("and"), "completion_ids": small_ids("x")},
    ]
    model = student(pair).eval()
    trainer = RecordTrainer(model, config(tmp_path, loss="sft"), datasets.Dataset.from_list(rows))
    losses = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1, :VOCAB]
        losses.append(-sampled_logprobs(logits, torch.tensor(row["completion_ids"])))
    with torch.no_grad():
        together = trainer.compute_loss(model, trainer.records(rows))
    assert together.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    trainer.args.loss_reduction = "sequence"
    with torch.no_grad():
        by_sequence = trainer.compute_loss(model, trainer.records(rows))
    assert by_sequence.item() == pytest.approx(torch.stack([loss.mean() for loss in losses]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_accumulated_batches_are_one_batch(pair, tmp_path, reduction):
    rows = datasets.Dataset.from_list(
        [{"prompt_ids": [9, 10], "completion_ids": [11, 12, 13, 14][: 1 + i % 4]} for i in range(8)]
    )
    weights = []
    for batch, steps in ((8, 1), (2, 4)):
        model = student(pair)
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        arguments = config(tmp_path, loss="sft", loss_reduction=reduction, optim="sgd", learning_rate=0.1, **settings)
        trainer = RecordTrainer(model, arguments, rows)
        with torch.no_grad():
            expected = trainer.compute_loss(model, trainer.records(list(rows))).item()
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
        weights.append(model.lm_head.weight.detach())
    assert (weights[0] - student(pair).lm_head.weight).abs().max() > 1e-4
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_a_batch():
    rows = [
        {
            "student_prompt_ids": [5, 6], "token_ids": [7], "teacher_logprob": [-0.5], "mixture_logprob": [-0.25],
            "sampling": json.dumps({"temperature": 0.0}), "behaviour_logprob": [0.0],
        },
        {
            "student_prompt_ids": [8], "token_ids": [9, 10], "teacher_logprob": [None, -1.0],
            "mixture_logprob": [-2.0, -3.0], "sampling": {"temperature": 0.5, "top_p": 1.0, "top_k": -1, "min_p": 0.0},
        },
    ]  # fmt: skip
    batch = RecordCollator(Objective("policy_gradient"))(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [0, 8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2], [0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, -100, 9, 10]]
    assert batch["token_ids"].tolist() == [[7, 0], [9, 10]] and batch["mask"].tolist() == [[True, False], [True, True]]
    assert batch["temperature"].tolist() == [1.0, 0.5]
    assert batch["teacher_logprob"].tolist() == [[-0.5, -math.inf], [-math.inf, -1.0]]
    assert batch["behaviour_logprob"].tolist() == [[0.0, -math.inf], [-2.0, -3.0]]
    assert "temperature" not in RecordCollator(Objective("sft"))(rows)


def test_which_arrays_a_divergence_reads():
    assert Objective("forward_kl").top_k == (
        "top_k_teacher_ids",
        "top_k_teacher_teacher_logprobs",
        "top_k_teacher_teacher_tail",
    )
    assert Objective("reverse_kl").top_k == (
        "top_k_student_ids",
        "top_k_student_teacher_logprobs",
        "top_k_student_teacher_tail",
    )
    assert Objective("mixture_kl").top_k == (
        "top_k_mixture_ids",
        "top_k_mixture_mixture_logprobs",
        "top_k_mixture_mixture_tail",
    )
    assert Objective("jsd", top_k_ids="mixture").top_k == (
        "top_k_mixture_ids", "top_k_mixture_teacher_logprobs", "top_k_mixture_teacher_tail",
    )  # fmt: skip
    assert Objective("sft").top_k is None


def test_a_support_that_ends_before_k():
    """The loss is that of the tokens that there are."""
    short = {
        **ROW, "top_k_teacher_ids": [[0, 2], [3]], "top_k_teacher_teacher_logprobs": [[math.log(0.75), None], [0.0]],
        "top_k_teacher_teacher_tail": [0.25, 0.0],
    }  # fmt: skip
    long = {
        **ROW, "token_ids": [6], "top_k_teacher_ids": [[4, 3, 1]],
        "top_k_teacher_teacher_logprobs": [[math.log(0.5), math.log(0.25), math.log(0.125)]],
        "top_k_teacher_teacher_tail": [0.125],
    }  # fmt: skip
    batch = RecordCollator(Objective("forward_kl"))([short, long])
    assert batch["top_k_ids"].tolist() == [[[0, 2, 1], [3, 0, 1]], [[4, 3, 1], [0, 1, 2]]]
    assert batch["top_k_logprobs"][0].isneginf().tolist() == [[False, True, True], [False, True, True]]
    logits = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))
    losses, _ = Objective("forward_kl")(logits, batch)
    alone, _ = Objective("forward_kl")(logits[:1], RecordCollator(Objective("forward_kl"))([short]))
    # At the second token the teacher has no other: −log p_s of it, over the support that the ids leave.
    student = logits[0, 1].log_softmax(-1).exp()
    assert losses[0, 1].item() == pytest.approx(-math.log(student[3] / (1 - student[0] - student[1])), rel=1e-5)
    assert alone[0, 1].item() == pytest.approx(-math.log(student[3] / (1 - student[0])), rel=1e-5)


ROW = {
    "id": "p7", "student_prompt_ids": [5], "token_ids": [6, 7], "teacher_logprob": [-1.0, -1.0],
    "mixture_logprob": [-1.0, -1.0], "sampling": '{"temperature": 1.0}',
    "top_k_teacher_ids": [[1, 2], [3, 4]], "top_k_teacher_teacher_logprobs": [[-1.0, -2.0], [-1.0, -2.0]],
    "top_k_teacher_teacher_tail": [0.4, 0.4],
}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "changes", "said"),
    [
        ("sft", {"student_prompt_ids": []}, "^student_prompt_ids: record p7 has none"),
        ("sft", {"token_ids": None}, "^token_ids: record p7 has none"),
        ("policy_gradient", {"teacher_logprob": [-1.0]}, "^teacher_logprob: record p7 has 1 values for 2 tokens"),
        ("policy_gradient", {"teacher_logprob": []}, "^teacher_logprob: record p7 has none, and the loss needs"),
        ("policy_gradient", {"sampling": None}, "^temperature: record p7 has no `sampling`"),
        ("policy_gradient", {"sampling": '{"temperature": 0.0}'}, "^behaviour: record p7 was drawn with temperature 0"),
        ("policy_gradient", {"sampling": '{"temperature": 1, "top_p": 0.9}'}, "^behaviour: .* with top_p 0.9, so that"),
        ("policy_gradient", {"sampling": '{"temperature": 1, "top_k": 20}'}, "^behaviour: .* with top_k 20"),
        ("policy_gradient", {"sampling": '{"temperature": 1, "min_p": 0.1}'}, "^behaviour: .* with min_p 0.1"),
        ("forward_kl", {"top_k_teacher_ids": None}, "^top_k_teacher_ids: record p7 has none, and the loss needs"),
        ("forward_kl", {"top_k_teacher_teacher_tail": [0.4]}, "^top_k_teacher_teacher_tail: .* 1 values for 2 tokens"),
        ("forward_kl", {"top_k_teacher_ids": [[1, 2], [3]]}, "_teacher_logprobs: .* 2 values for 1 ids at token 1"),
        ("forward_kl", {"top_k_teacher_ids": [[], []], "top_k_teacher_teacher_logprobs": [[], []]}, "has no ids at"),
        ("forward_kl", {"top_k_teacher_ids": [[1, 1], [3, 4]]}, "^top_k_teacher_ids: .* or one twice"),
        ("mixture_kl", {}, "^top_k_mixture_ids: record p7 has none, and the loss needs it; see docs/training.md"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(loss, changes, said):
    collate = RecordCollator(Objective(loss))
    if loss != "mixture_kl":
        collate([ROW])
    with pytest.raises(ValueError, match=said):
        collate([{**ROW, **changes}])


def test_what_may_be_said_in_place_of_sampling():
    row = {**ROW, "sampling": None}
    collate = RecordCollator(Objective("policy_gradient"), temperature=0.0, behaviour="mixture_logprob")
    batch = collate([row])
    assert batch["temperature"].tolist() == [1.0] and batch["behaviour_logprob"].tolist() == [[-1.0, -1.0]]
    with pytest.raises(ValueError, match="^max_length: record p7 has 1 [+] 2 tokens, more than 2"):
        RecordCollator(Objective("sft"), max_length=2)([ROW])
    with pytest.raises(ValueError, match="^rows: a batch needs"):
        collate([])
    with pytest.raises(ValueError, match="^temperature: must not be negative"):
        RecordCollator(Objective("sft"), temperature=-1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "kl"}, "^loss: must be one of sft, importance_sft"),
        ({"beta": 2.0}, "^beta: must be in"),
        ({"top_k_ids": "both"}, "^top_k_ids: must be one of teacher, student, mixture"),
        ({"weights_towards": "mixture"}, "^weights_towards: must be one of teacher, student"),
        ({"weight_level": "batch"}, "^weight_level: must be one of token, sequence"),
        ({"max_weight": -1.0}, "^max_weight: must be positive"),
        ({"loss_reduction": "none"}, "^loss_reduction: must be one of token, sequence"),
        ({"update_every": 0}, "^update_every: must be at least 1"),
        ({"vocab_size": 0}, "^vocab_size: must be at least 1"),
    ],
)
def test_settings_that_are_wrong(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


def test_evaluation(pair, records, tmp_path):
    model = student(pair)
    some = records.select(range(0, len(records), 8))
    trainer = RecordTrainer(model, config(tmp_path, loss="mixture_kl"), records, eval_dataset=some)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(distance(model, records), rel=1e-4)


# -- the live trainer --------------------------------------------------------------------------------------------------

PROMPTS = datasets.Dataset.from_list(
    [{"prompt": t, "student_prompt": s} for t, s in zip(TEACHER_PROMPTS, STUDENT_PROMPTS, strict=True)]
)


@pytest.mark.parametrize("loss", ["policy_gradient", "mixture_kl"])
def test_rollouts(pair, records, tmp_path, loss):
    """The student learns from its own rollouts, and the sampler follows it."""
    model, sampler = student(pair), FakeSampler(*pair)
    settings = {"loss": loss, "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
    trainer = RolloutTrainer(
        model, config(tmp_path, **settings), sampler, PROMPTS,
        sampling={"n": 64, "max_new_tokens": 4, "temperature": TEMPERATURE},
    )  # fmt: skip
    before = distance(model, records, "reverse_kl")
    trainer.train()
    assert distance(model, records, "reverse_kl") < 0.9 * before
    assert sampler.updates == 1 + 8 and len(sampler.calls) == 8
    assert all(call["custom_params"]["return_prompts"] for call in sampler.calls)
    for name, weight in sampler.student.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)
    ratios = [entry["ess_ratio"] for entry in trainer.state.log_history if "ess_ratio" in entry]
    assert len(ratios) == (8 if loss == "policy_gradient" else 0)


def test_the_sampler_gets_the_model_s_weights_before_the_first_step_and_seldom(pair, tmp_path):
    """A model that is not the sampler's student; ratios are those of one and the same model at once."""
    model, sampler = student(pair), FakeSampler(*pair)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    settings = {"loss": "policy_gradient", "max_steps": 5, "update_every": 2, "learning_rate": 1e-9}
    trainer = RolloutTrainer(model, config(tmp_path, **settings), sampler, PROMPTS)
    trainer.train()
    assert sampler.updates == 1 + 2
    torch.testing.assert_close(sampler.student.lm_head.weight, model.lm_head.weight, rtol=0, atol=1e-6)
    (record, _) = trainer.rollouts(list(PROMPTS))
    assert json.loads(record["sampling"]) == {"temperature": 1.0}


def test_a_budget_that_falls(pair, tmp_path):
    """What is sampled follows the optimizer's steps, not the batches that are accumulated."""
    sampler = FakeSampler(*pair)
    settings = {"loss": "reverse_kl", "max_steps": 3, "gradient_accumulation_steps": 2}
    settings["per_device_train_batch_size"] = len(PROMPTS) // 2
    RolloutTrainer(
        student(pair), config(tmp_path, **settings), sampler, PROMPTS,
        sampling=lambda step: {"kl_budget": 0.4 / 2**step, "temperature": 0.5 + step},
    ).train()  # fmt: skip
    assert [call["kl_budget"] for call in sampler.calls] == [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]
    assert [call["temperature"] for call in sampler.calls] == [0.5, 0.5, 1.5, 1.5, 2.5, 2.5]


@pytest.mark.parametrize("sampling", [lambda step: None, lambda step: 0.1, 0.1, ["kl_budget"]])
def test_sampling_that_is_no_mapping(pair, tmp_path, sampling):
    with pytest.raises(ValueError, match="sampling: must be a mapping, or a function of the step that gives one; got"):
        RolloutTrainer(student(pair), config(tmp_path), FakeSampler(*pair), PROMPTS, sampling=sampling)


def test_an_adapter_is_merged(pair, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(student(pair), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    sampler = FakeSampler(*pair)
    settings = {"loss": "policy_gradient", "max_steps": 2, "learning_rate": 1e-2}
    RolloutTrainer(model, config(tmp_path, **settings), sampler, PROMPTS, sampling={"n": 4}).train()
    merged = model.merge_and_unload().state_dict()
    old = load_file(pair[1] / "model.safetensors")
    changed = [name for name, weight in sampler.student.state_dict().items() if not torch.equal(weight, old[name])]
    assert any("q_proj" in name for name in changed)
    for name, weight in sampler.student.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_alone(pair):
    """Where the sampler's student is one: by the names that its file has."""
    from peft import LoraConfig, get_peft_model

    given = {}
    sampler = types.SimpleNamespace(student_is_adapter=True, update_student_weights=given.update)
    model = student(pair)
    with pytest.raises(ValueError, match="^model: the sampler's student is an adapter"):
        give_weights(sampler, model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    give_weights(sampler, model)
    assert len(given) == 2 * 2 * len(model.get_base_model().model.layers)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(given[name], dict(model.named_parameters())[name.replace(".weight", ".default.weight")])


def test_token_ids_as_prompts(pair, tmp_path):
    sampler = FakeSampler(*pair, returns_prompts=False)
    trainer = RolloutTrainer(student(pair), config(tmp_path, loss="policy_gradient"), sampler, PROMPTS)
    with pytest.raises(ValueError, match="^student_prompt: the sampler does not return prompts; give token ids"):
        trainer.rollouts(list(PROMPTS))
    (record,) = trainer.rollouts([{"prompt": [9, 10], "student_prompt": [11]}])
    assert record["student_prompt_ids"] == [11]
    with pytest.raises(ValueError, match="^student_prompt: every row"):
        trainer.rollouts([{"prompt": [9, 10]}])


def test_a_sample_that_was_aborted(pair, tmp_path):
    sampler = FakeSampler(*pair)
    trainer = RolloutTrainer(student(pair), config(tmp_path, loss="policy_gradient"), sampler, PROMPTS)
    generate = sampler.generate

    def aborted(*prompts, **sampling):
        results = generate(*prompts, **sampling)
        results[1].finish_reason = "abort"
        return results

    sampler.generate = aborted
    with pytest.raises(RuntimeError, match="^sampler: a sample ended with 'abort'"):
        trainer.rollouts(list(PROMPTS))


def test_rollouts_that_were_cut_need_the_behaviour(pair, tmp_path):
    trainer = RolloutTrainer(
        student(pair), config(tmp_path, loss="policy_gradient", max_steps=1),
        FakeSampler(*pair, tells_behaviour=False), PROMPTS, sampling={"top_p": 0.9},
    )  # fmt: skip
    with pytest.raises(ValueError, match="^behaviour: row 0 of the batch was drawn with top_p 0.9"):
        trainer.train()


def test_rollouts_for_evaluation(pair, tmp_path):
    trainer = RolloutTrainer(
        student(pair), config(tmp_path, loss="mixture_kl"), FakeSampler(*pair), PROMPTS, eval_dataset=PROMPTS
    )
    assert 0 < trainer.evaluate()["eval_loss"] < 5


def test_an_engine(tiny_pair, tmp_path):
    """The same with a real OptimalSampler: its log-probabilities are the trainer's, its student becomes the model."""
    from harness import start

    model = AutoModelForCausalLM.from_pretrained(tiny_pair[1])
    settings = {"loss": "policy_gradient", "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 3e-2}
    greedy = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True, "fixed_alpha": 0.0}

    @torch.no_grad()
    def continued(ids: list[int]) -> list[int]:
        """By the model alone; the padding of its vocabulary is not in the mixture's."""
        for _ in range(8):
            ids = [*ids, model.eval()(torch.tensor([ids])).logits[0, -1, :VOCAB].argmax().item()]
        return ids[-8:]

    with start(tiny_pair, student_weights="separate") as sampler:
        trainer = RolloutTrainer(
            model,
            config(tmp_path, **settings),
            sampler,
            PROMPTS,
            sampling={
                "n": 8, "max_new_tokens": 6, "ignore_eos": True, "temperature": TEMPERATURE, "top_p": 0.9,
                "return_top_k": 3,
            },
        )  # fmt: skip
        rows = trainer.rollouts(list(PROMPTS))
        for row in rows:
            assert all(len(row[f"top_k_{side}_{name}"]) == 6 for side in ("teacher", "student") for name in ARRAYS)
            assert all(b >= q - 1e-4 for b, q in zip(row["behaviour_logprob"], row["mixture_logprob"], strict=True))
        batch = trainer.records(rows)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            logits = model(**inputs).logits[:, -7:-1, :VOCAB]
        series = torch.tensor([row["student_logprob"] for row in rows])
        assert series.shape == (16, 6)
        torch.testing.assert_close(sampled_logprobs(logits, batch["token_ids"], TEMPERATURE), series, rtol=0, atol=1e-3)

        prompt = rows[0]["student_prompt_ids"]
        answers = []
        for _ in range(2):
            answers.append(sampler.generate(prompt, prompt, **greedy).token_ids)
            assert answers[-1] == continued(prompt)
            trainer.train()
        assert answers[0] != answers[1]
