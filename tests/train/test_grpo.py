"""GRPO with rollouts from the mixture: what TRL is told drew the tokens, and a reward that rises."""

from __future__ import annotations

import datasets
import pytest
import torch
from fake_sampler import FakeSampler
from tiny_models import build_tiny_tokenizer_model, small_ids
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from sglang_optimal import OptimalSampler
from sglang_optimal.train import MixtureGRPOTrainer

SIZE = {"hidden_size": 32, "num_layers": 1, "logit_std": 1.0}
ROWS = datasets.Dataset.from_list(
    [
        {"prompt": "what is 2 + 3?", "teacher_prompt": "what is 2 + 3? it is 5."},
        {"prompt": "a colour?", "teacher_prompt": "a colour? red"},
    ]
    * 32
)
WANTED = small_ids("a")[-1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("grpo-pair")
    teacher = build_tiny_tokenizer_model(root / "teacher", seed=1, **SIZE)
    return teacher, build_tiny_tokenizer_model(root / "student", seed=2, **SIZE)


def reward(completion_ids, **columns) -> list[float]:
    """The share of one token."""
    return [sum(token == WANTED for token in ids) / len(ids) for ids in completion_ids]


def trainer_of(pair, sampler, tmp_path, **settings) -> MixtureGRPOTrainer:
    own = {name: settings.pop(name) for name in ("sampling", "update_every", "train_dataset") if name in settings}
    defaults = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 32, "num_generations": 16,
        "max_completion_length": 6, "learning_rate": 2e-2, "max_steps": 12, "loss_type": "vespo", "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 3, "bf16": False,
        "temperature": 0.8,
    }  # fmt: skip
    return MixtureGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(pair[1]),
        reward,
        GRPOConfig(**{**defaults, **settings}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(pair[1]),
        sampler=sampler,
        **{"train_dataset": ROWS, **own},
    )


def rewards(trainer) -> list[float]:
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


@pytest.mark.slow  # the trainer with an engine, and what it takes for the old policy, are in every run
@pytest.mark.parametrize("loss_type", ["vespo", "dr_grpo"])
def test_the_reward_rises(pair, tmp_path, loss_type):
    sampler = FakeSampler(*pair)
    trainer = trainer_of(pair, sampler, tmp_path, loss_type=loss_type)
    trainer.train()
    seen = rewards(trainer)
    assert len(seen) == 12 and sum(seen[-3:]) > 2.5 * sum(seen[:3]), seen
    assert sampler.updates == 1 + 12
    for name, weight in sampler.student.state_dict().items():
        torch.testing.assert_close(weight, trainer.model.state_dict()[name], rtol=0, atol=0)


def test_the_old_policy_is_what_drew_the_tokens(pair, tmp_path):
    """And at alpha 0, where that is the student, every importance weight is 1."""
    sampler = FakeSampler(*pair)
    trainer = trainer_of(pair, sampler, tmp_path)
    trainer.update_sampler()
    rows = [ROWS[0]] * 16
    output = trainer._generate_and_score_completions(rows)
    drawn = sampler.generate(
        [row["teacher_prompt"] for row in rows], [row["prompt"] for row in rows], max_new_tokens=6, temperature=0.8,
        return_mixing_info=True, seed=1,
    )  # fmt: skip
    expected = torch.tensor([result.mixing_info["mixture_logprob"] for result in drawn])
    torch.testing.assert_close(output["old_per_token_logps"], expected)
    assert output["completion_ids"].tolist() == [result.token_ids for result in drawn]
    assert all(name not in sampler.calls[0] for name in ("prompt", "n"))


def test_with_an_engine(pair, tmp_path):
    """The recomputed log-probabilities are the engine's at alpha 0, and the engine follows the student."""
    with OptimalSampler(
        str(pair[0]), str(pair[1]), dtype="float32", context_length=256, max_total_tokens=4000, random_seed=1,
        mem_fraction_static=0.3, fixed_alpha=0.0,
    ) as sampler:  # fmt: skip
        trainer = trainer_of(pair, sampler, tmp_path, max_steps=10)
        ratios = []
        compute = trainer._compute_loss

        def watched(model, inputs):
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                inputs["completion_ids"].shape[1],
            )
            off = (logps - inputs["old_per_token_logps"])[inputs["completion_mask"].bool()]
            ratios.append(float(off.detach().abs().max()))
            return compute(model, inputs)

        trainer._compute_loss = watched
        trainer.train()
        seen = rewards(trainer)
        assert sum(seen[-3:]) > 2.5 * sum(seen[:3]), seen
        assert len(ratios) == 10 and max(ratios) < 1e-3, ratios


def test_a_budget_that_falls(pair, tmp_path):
    sampler = FakeSampler(*pair)
    budgets = {0: 0.5, 1: 0.2, 2: 0.05}
    trainer_of(pair, sampler, tmp_path, sampling=lambda step: {"kl_budget": budgets[step]}, max_steps=3).train()
    assert [call["kl_budget"] for call in sampler.calls] == [0.5, 0.2, 0.05]


def test_bad_arguments(pair, tmp_path):
    sampler = FakeSampler(*pair)
    with pytest.raises(ValueError, match="sampling: temperature is args'"):
        trainer_of(pair, sampler, tmp_path, sampling={"temperature": 1.0})
    with pytest.raises(ValueError, match="sampling: top_p is args'"):
        trainer_of(pair, sampler, tmp_path, sampling=lambda step: {"top_p": 0.9})
    with pytest.raises(ValueError, match="update_every: must be at least 1"):
        trainer_of(pair, sampler, tmp_path, update_every=0)
    trainer = trainer_of(pair, sampler, tmp_path, train_dataset=ROWS.remove_columns("teacher_prompt"))
    with pytest.raises(ValueError, match="teacher_prompt: every row"):
        trainer.train()
