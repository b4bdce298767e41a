"""Sampling parameters keep their meaning on the mixture."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest
import torch
from harness import Case, check_greedy, check_pools, oracle_settings, random_cases, random_ids, run, start
from scipy.stats import chisquare

DRAWS = 3000


@pytest.fixture(scope="module", params=[{}, {"mixing_mode": "speculative", "draft_tokens": 3}], ids=["", "drafts"])
def sampler(request, tiny_pair):
    with start(tiny_pair, max_running_requests=256, max_total_tokens=20_000, **request.param) as engine:
        engine.drafts = bool(request.param)
        yield engine


@pytest.fixture(autouse=True)
def pools_are_full_again(sampler):
    yield
    check_pools(sampler)


@pytest.fixture(scope="module")
def contexts():
    rng = random.Random(21)
    return random_ids(rng, 14), random_ids(rng, 9)


def draw(sampler, contexts, draws=DRAWS, n=1, alpha=None, **params) -> list[list[int]]:
    case = Case(*contexts, n, alpha or {})
    return [output["output_ids"] for output in run(sampler, [case] * draws, **params)]


def assert_fits(counts: Counter, probs: torch.Tensor) -> None:
    """Chi-square of counts against probabilities [V]; rare tokens are pooled. Fails for about one seed in 10^5."""
    total = sum(counts.values())
    impossible = [token for token in counts if probs[token] == 0]
    assert not impossible, f"tokens of probability 0 were drawn: {impossible}"
    common = [token for token in range(len(probs)) if probs[token] * total >= 8]
    observed = [counts[token] for token in common]
    expected = [float(probs[token]) * total for token in common]
    if total - sum(expected) > 1e-6 * total:
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    assert chisquare(observed, [e * total / sum(expected) for e in expected]).pvalue > 1e-5


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.25},
    {"temperature": 0.8, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_distribution_of_the_first_token(sampler, tiny_oracle, contexts, filters):
    if sampler.drafts:
        pytest.skip("the first token comes from the prefill, where nothing is drafted")
    params = {"temperature": 1.0, **filters}
    draws = draw(sampler, contexts, **params)
    probs = tiny_oracle.next_token_distribution(*contexts, **params)
    assert_fits(Counter(ids[0] for ids in draws), probs)


@pytest.mark.parametrize(
    "alpha",
    [{"alpha_method": "ess_balance"}, {"alpha_method": "entropy", "alpha_max": 0.45}, {"fixed_alpha": 1.5}],
    ids=str,
)
def test_distribution_of_later_tokens(sampler, tiny_oracle, contexts, alpha):
    """The second and third token come from decode steps, each with its own alpha."""
    draws = draw(sampler, contexts, draws=1500, n=3, alpha=alpha, temperature=0.35)
    settings = oracle_settings(alpha)
    teacher, student = contexts
    for position in (1, 2):
        # Draws with different histories have different distributions; expected counts add up over the histories.
        histories = Counter(tuple(ids[:position]) for ids in draws)
        expected = sum(
            count * tiny_oracle.next_token_distribution([*teacher, *h], [*student, *h], temperature=0.35, **settings)
            for h, count in histories.items()
        )
        assert_fits(Counter(ids[position] for ids in draws), expected / len(draws))


SEQUENCES = [
    ({}, {"temperature": 1.0, "top_k": 3}),
    ({"alpha_method": "ess_balance"}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}),
    ({"alpha_method": "reverse_kl_symmetry"}, {"temperature": 1.4, "top_k": 4, "top_p": 0.1, "min_p": 0.5}),
    ({"alpha_method": "entropy"}, {"temperature": 1.0, "top_k": 3, "min_p": 0.3}),
    ({"fixed_alpha": 1.3}, {"temperature": 0.7, "top_k": 3}),
    ({"fixed_alpha": 0.2}, {"temperature": 1.0, "top_k": 4}),
    ({"kl_budget": 0.1}, {"temperature": 1.0, "top_k": 3}),
]


@pytest.mark.parametrize("alpha,filters", SEQUENCES, ids=str)
def test_distribution_of_whole_sequences(sampler, tiny_oracle, contexts, alpha, filters):
    """Four tokens, of which three come from decode steps, or from one where the student drafts."""
    settings = oracle_settings(alpha)
    teacher, student = contexts
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        grown = {}
        for history, chance in expected.items():
            probs = tiny_oracle.next_token_distribution(
                [*teacher, *history], [*student, *history], **filters, **settings
            )
            grown |= {(*history, int(token)): chance * float(probs[token]) for token in probs.nonzero()}
        expected = grown
    index = {sequence: i for i, sequence in enumerate(expected)}
    draws = draw(sampler, contexts, draws=1500, n=4, alpha=alpha, **filters)
    counts = Counter(index[tuple(ids)] for ids in draws)  # a KeyError: a sequence that cannot be
    assert_fits(counts, torch.tensor(list(expected.values()), dtype=torch.float64))


def test_temperature_of_each_row_is_its_own(sampler, tiny_oracle, contexts):
    cold, hot = {"temperature": 0.3}, {"temperature": 1.6}
    case = Case(*contexts, 1)
    outputs = sampler.engine.generate(
        input_ids=[case.teacher] * 3000, sampling_params=[case.params(**(cold if i % 2 else hot)) for i in range(3000)]
    )
    for start_at, params in ((1, cold), (0, hot)):
        counts = Counter(output["output_ids"][0] for output in outputs[start_at::2])
        assert_fits(counts, tiny_oracle.next_token_distribution(*contexts, **params))


def test_logprobs_are_the_mixtures(sampler, tiny_oracle):
    cases = random_cases(22, 4, 2)
    outputs = sampler.engine.generate(
        input_ids=[c.teacher for c in cases],
        sampling_params=[c.params() for c in cases],
        return_logprob=True,
        top_logprobs_num=3,
        logprob_start_len=-1,
    )
    for case, output in zip(cases, outputs, strict=True):
        meta = output["meta_info"]
        values = [entry[0] for entry in meta["output_token_logprobs"]]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == output["output_ids"]
        if case.student is None:
            continue
        assert values == pytest.approx(meta["mixture_logprob"], abs=1e-4)
        probs = tiny_oracle.next_token_distribution(case.teacher, case.student, **oracle_settings(case.alpha))
        top = probs.log().topk(3)
        assert [e[1] for e in meta["output_top_logprobs"][0]] == top.indices.tolist()
        assert [e[0] for e in meta["output_top_logprobs"][0]] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_frequency_and_presence_penalty(sampler, tiny_oracle):
    """Penalties are linear biases: applied to both models, they come out once and alpha sees them.

    They count what SGLang 0.5.23 counts under overlap scheduling: at each decode step the newest token it knows, which
    is one behind, and the prompt's last token at the first step.
    """
    case = random_cases(23, 1, 0)[0]
    case.n, case.alpha = 25, {}
    output = run(sampler, [case], frequency_penalty=0.9, presence_penalty=0.6)[0]
    done: list[int] = []
    for token, alpha in zip(output["output_ids"], output["meta_info"]["alpha"], strict=True):
        counted = Counter([case.teacher[-1], *done[:-1]] if done else [])
        bias = {t: -0.9 * count - 0.6 for t, count in counted.items()}
        step = tiny_oracle.generate_greedy(case.teacher + done, case.student + done, 1, logit_bias=bias)
        assert token == step.token_ids[0] or step.margins[0] < 2e-4
        assert alpha == pytest.approx(step.alphas[0], abs=1e-4)
        done.append(token)
    assert done != run(sampler, [case])[0]["output_ids"]


def test_logit_bias(sampler, tiny_oracle):
    case = random_cases(24, 1, 0)[0]
    case.bias = {20: 2.0, 21: 2.5, 22: -100.0}
    output = run(sampler, [case])[0]
    expected = tiny_oracle.generate_greedy(case.teacher, case.student, case.n, logit_bias=case.bias, **case.alpha)
    assert output["output_ids"] == expected.token_ids
    assert output["meta_info"]["alpha"] == pytest.approx(expected.alphas, abs=1e-4)


def test_min_new_tokens_masks_the_end(sampler, contexts):
    """While the end is masked on both sides it cannot come; mixed rows without the limit do end early."""
    outputs = draw(sampler, contexts, draws=100, n=60, temperature=2.0, ignore_eos=False, min_new_tokens=40)
    assert min(len(ids) for ids in outputs) >= 40
    free = draw(sampler, contexts, draws=100, n=60, temperature=2.0, ignore_eos=False)
    assert min(len(ids) for ids in free) < 40


def test_stop_string(sampler):
    case = random_cases(25, 1, 0)[0]
    case.n = 40
    text = run(sampler, [case])[0]["text"]
    stop = text[12:15]
    output = run(sampler, [case], stop=stop)[0]
    assert output["text"] == text[: text.index(stop)]
    assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert len(output["meta_info"]["alpha"]) == len(output["output_ids"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_regex_grammar(sampler, contexts, temperature):
    cases = [Case(*contexts, 40), Case(contexts[0], None, 40), Case(contexts[1], contexts[0], 40)]
    pattern = r"(yes|no), [0-9]{3}\."
    outputs = run(sampler, cases, regex=pattern, temperature=temperature, ignore_eos=False)
    for case, output in zip(cases, outputs, strict=True):
        assert re.fullmatch(pattern, output["text"]), output["text"]
        if case.student is not None:
            assert len(output["meta_info"]["alpha"]) == len(output["output_ids"])


def test_grammar_beside_free_rows(sampler, tiny_oracle):
    """A grammar masks its own row only."""
    cases = random_cases(26, 4, 1)
    outputs = sampler.engine.generate(
        input_ids=[c.teacher for c in cases],
        sampling_params=[c.params(**({"regex": "[0-9]+"} if i == 0 else {})) for i, c in enumerate(cases)],
    )
    assert re.fullmatch("[0-9]+", outputs[0]["text"])
    for case, output in list(zip(cases, outputs, strict=True))[1:]:
        check_greedy(tiny_oracle, case, output)


def test_json_schema(sampler, contexts):
    schema = json.dumps({"type": "string", "maxLength": 6})
    outputs = run(sampler, [Case(*contexts, 40)] * 8, json_schema=schema, temperature=1.0, ignore_eos=False)
    for output in outputs:
        assert len(json.loads(output["text"])) <= 6


def test_n_samples(sampler, contexts):
    """n samples of one prompt are different draws, each with alphas of its own, and share the prompt's cache."""
    case = Case(*contexts, 6)
    outputs = sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params(temperature=1.0, n=5))
    assert len(outputs) == 5
    assert len({tuple(output["output_ids"]) for output in outputs}) > 1
    for output in outputs:
        assert len(output["meta_info"]["alpha"]) == 6


def test_streaming(sampler, tiny_oracle):
    """Chunks carry growing, aligned series."""
    case = random_cases(27, 1, 0, tokens=(20, 20))[0]
    lengths = []
    for chunk in sampler.engine.generate(input_ids=case.teacher, sampling_params=case.params(), stream=True):
        assert len(chunk["meta_info"]["alpha"]) == len(chunk["meta_info"]["kl_to_teacher"]) == len(chunk["output_ids"])
        lengths.append(len(chunk["output_ids"]))
    assert lengths == sorted(lengths) and lengths[-1] == 20 and len(lengths) > 3
    check_greedy(tiny_oracle, case, chunk)


@pytest.mark.parametrize("plain", [0, 2])
def test_series_of_sampled_tokens(sampler, plain):
    """Sampling overwrites the mixture's logits; the series still tell the logprob that SGLang returns."""
    cases = random_cases(23, 4, plain)
    outputs = sampler.engine.generate(
        input_ids=[c.teacher for c in cases],
        sampling_params=[c.params(temperature=0.7) for c in cases],
        return_logprob=True,
    )
    for case, output in zip(cases, outputs, strict=True):
        meta = output["meta_info"]
        if case.student is not None:
            values = [entry[0] for entry in meta["output_token_logprobs"]]
            assert meta["mixture_logprob"] == pytest.approx(values, abs=1e-4)
