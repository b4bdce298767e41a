"""Seeds on the mixture. SGLang reads ``sampling_seed`` in deterministic mode only, which needs a GPU.

Without one, SGLang's sampler is run by hand on both models' logits, with a stand-in for its seeded draw: that is a CUDA
kernel.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from harness import Case, check_pools, start

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="SGLang's deterministic mode has no attention backend for CPU"
)
TEACHER, STUDENT = [10, 11, 12, 13], [20, 21]


@pytest.fixture(scope="module")
def sampler(tiny_pair):
    with start(tiny_pair, enable_deterministic_inference=True) as engine:
        yield engine
        check_pools(engine)


def draw(sampler, seeds, **alpha):
    case = Case(TEACHER, STUDENT, 12, alpha)
    outputs = sampler.engine.generate(
        input_ids=[TEACHER] * len(seeds),
        sampling_params=[case.params(temperature=1.0, sampling_seed=seed) for seed in seeds],
    )
    return [output["output_ids"] for output in outputs]


@needs_gpu
def test_a_seed_decides_the_tokens_whatever_else_is_in_the_batch(sampler):
    alone = [draw(sampler, [seed])[0] for seed in (1, 2, 3)]
    assert len({tuple(ids) for ids in alone}) == 3
    assert draw(sampler, [5, 3, 1, 1, 2, 9])[1:5] == [alone[2], alone[0], alone[0], alone[1]]


@needs_gpu
def test_a_seed_means_what_it_means_in_sglang(sampler):
    """With all weight on the teacher the same seed draws the teacher's own tokens."""
    plain = Case(TEACHER, None, 12).params(temperature=1.0, sampling_seed=4)
    expected = sampler.engine.generate(input_ids=TEACHER, sampling_params=plain)["output_ids"]
    assert draw(sampler, [4], fixed_alpha=1.0)[0] == expected
    assert draw(sampler, [4])[0] != expected


def seeded_draw(logprobs, seeds, positions):
    """Gumbel-max with noise that depends on the row's seed and position alone. Returns [B, 1]."""
    keys = zip(seeds.tolist(), positions.tolist(), strict=True)
    noise = [torch.rand(logprobs.shape[1], generator=torch.Generator().manual_seed(64 * s + p)) for s, p in keys]
    return (logprobs - torch.log(-torch.log(torch.stack(noise)))).argmax(-1, keepdim=True)


@pytest.fixture
def seeded_sampler(monkeypatch):
    """MixtureSampler as deterministic mode builds it, without an engine around it."""
    from sglang.srt.layers import sampler

    from sglang_optimal.runtime.sampling.sampler import MixtureSampler

    exec_context = SimpleNamespace(
        deterministic=SimpleNamespace(rl_on_policy_target=None, enable_deterministic_inference=True),
        kernel=SimpleNamespace(sampling_backend="pytorch"),
        features=SimpleNamespace(sampling_mask_max_tokens=0),
    )
    parallel = SimpleNamespace(tp_group=SimpleNamespace(device_group=None), attn_cp_size=1)
    monkeypatch.setattr(sampler, "get_exec", lambda: exec_context)
    monkeypatch.setattr(sampler, "get_parallel", lambda: parallel)
    monkeypatch.setattr(sampler, "is_dp_attention_enabled", lambda: False)
    monkeypatch.setattr(sampler, "multinomial_with_seed", seeded_draw)
    return MixtureSampler()


def sample(sampler, teacher, student, seeds, positions, alpha=None):
    """Token ids [B] of one sampling step; ``alpha`` None: plain rows."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from sglang_optimal.mixing import AlphaParams
    from sglang_optimal.runtime.core import MixedRows
    from sglang_optimal.runtime.sampling.sampler import MixingStep
    from sglang_optimal.runtime.sampling.support import Support
    from sglang_optimal.wanted import Wanted

    n, vocab_size = teacher.shape
    info = SamplingBatchInfo(
        temperatures=torch.ones(n, 1),
        top_ps=torch.ones(n),
        top_ks=torch.full((n,), vocab_size, dtype=torch.int32),
        min_ps=torch.zeros(n),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=vocab_size,
        sampling_seed=torch.tensor(seeds),
        device="cpu",
    )
    if alpha is not None:
        settings = AlphaParams.from_lists(["fixed"] * n, [0.0] * n, [1.0] * n, [alpha] * n, "cpu")
        lengths = torch.zeros(n, dtype=torch.int64)
        rows = MixedRows([], list(range(n)), torch.arange(n), None, lengths, lengths, settings, Wanted())
        info.mixing = MixingStep(rows, student.clone(), Support(vocab_size))
    return sampler(LogitsProcessorOutput(next_token_logits=teacher.clone()), info, False, [], [], positions)


def test_seeded_sampling_of_the_mixture(seeded_sampler):
    """The same seed draws from the mixture what it draws from one model that has the mixture's logits."""
    n = 64
    teacher, student = torch.randn(2, n, 40, generator=torch.Generator().manual_seed(0))
    seeds, positions = list(range(n)), torch.arange(n) % 7
    mixed = sample(seeded_sampler, teacher, student, seeds, positions, alpha=0.3)
    logits = 0.7 * student.log_softmax(-1) + 0.3 * teacher.log_softmax(-1)
    assert torch.equal(mixed, sample(seeded_sampler, logits, None, seeds, positions))
    assert torch.equal(mixed, sample(seeded_sampler, teacher, student, seeds, positions, alpha=0.3))
    other = sample(seeded_sampler, teacher, student, [seed + 1000 for seed in seeds], positions, alpha=0.3)
    assert (mixed != other).sum() > n // 2
