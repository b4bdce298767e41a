"""Series of a token and the most likely tokens, against float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from series_oracle import check_series, check_top_k, entry_of

from sglang_optimal import decode_top_k
from sglang_optimal.mixing import AlphaParams, Sides, mix, more_series, top_k
from sglang_optimal.names import MORE_SERIES, SIDES
from sglang_optimal.top_k import TopK, public

NAMES = [name for name in MORE_SERIES if name != "behaviour_logprob"]
logit = st.one_of(st.floats(-8, 8, width=32), st.sampled_from([-np.inf, 0.0, 1.0]))


@st.composite
def sides_and_tokens(draw):
    """Rows with a common token each, ties and masks among them; the tokens have a probability."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    teacher, student = (
        torch.tensor([[draw(logit) for _ in range(width)] for _ in range(rows)], dtype=torch.float32) for _ in range(2)
    )
    tokens = torch.tensor([draw(st.integers(0, width - 1)) for _ in range(rows)])
    for logits in (teacher, student):
        logits[torch.arange(rows), tokens] = draw(st.floats(-3, 3, width=32))
    temperature = torch.tensor([draw(st.sampled_from([0.5, 1.0, 1.7])) for _ in range(rows)])
    fixed = [draw(st.sampled_from([-0.5, 0.0, 0.3, 1.0, 1.5])) for _ in range(rows)]
    params = AlphaParams.from_lists(["fixed"] * rows, [0.0] * rows, [1.0] * rows, fixed)
    return Sides(mix(teacher, student, temperature, params), teacher, student, temperature), tokens


def steps(sides: Sides) -> list[oracle.Mixture]:
    return [
        oracle.mix(t, s, temperature=float(T), alpha_method="fixed", fixed_alpha=float(alpha))
        for t, s, T, alpha in zip(
            sides.teacher_logits, sides.student_logits, sides.temperature.view(-1), sides.mixture.alpha, strict=True
        )
    ]


@given(sides_and_tokens())
def test_series(case):
    sides, tokens = case
    values = more_series(NAMES, sides, tokens)
    m = sides.mixture
    logprobs = sides.logprobs(tokens.unsqueeze(-1)).squeeze(-1)
    for i, step in enumerate(steps(sides)):
        token = int(tokens[i])
        row = dict(zip(NAMES, values[i].tolist(), strict=True))
        row |= dict(zip(("teacher_logprob", "student_logprob", "mixture_logprob"), logprobs[i].tolist(), strict=True))
        row |= {"alpha": float(m.alpha[i]), "behaviour_logprob": row["mixture_logprob"]}
        row |= {"kl_to_student": float(m.kl_to_student[i]), "kl_to_teacher": float(m.kl_to_teacher[i])}
        row["ess_ratio"] = row["ess_student"] / row["ess_teacher"]
        check_series(row, step, token, step.mixture.exp(), 5e-4)


@given(sides_and_tokens(), st.integers(1, 15), st.sampled_from(["lists", "base64"]))
def test_most_likely_tokens(case, k, form):
    """Ties, masks, more than there are; and the same through both formats."""
    sides, _ = case
    values = torch.stack([top_k(side, k, sides) for side in SIDES], dim=1)
    assert values.shape == (len(sides.temperature), 3, 4, k)
    sent = public([TopK(SIDES, form, row) for row in values.numpy()])
    decoded = decode_top_k(sent)
    lists = public([TopK(SIDES, "lists", row) for row in values.numpy()])
    for side in SIDES:
        for name, array in decoded[side].items():
            assert array.dtype == (np.int32 if name == "ids" else np.float32)
            expected = decode_top_k(lists)[side][name]
            assert np.array_equal(array[:, : expected.shape[1]] if array.ndim == 2 else array, expected)
        for i, step in enumerate(steps(sides)):
            check_top_k(entry_of(lists, side, i), side, k, step, 5e-4)


def test_rows_in_blocks(monkeypatch):
    """As on a CPU with a large vocabulary, a few rows at a time."""
    torch.manual_seed(5)
    teacher, student = torch.randn(7, 50), torch.randn(7, 50)
    temperature, tokens = torch.rand(7) + 0.5, torch.randint(50, (7,))
    sides = Sides(mix(teacher, student, temperature, AlphaParams.uniform(7)), teacher, student, temperature)
    whole = more_series(NAMES, sides, tokens), top_k("mixture", 5, sides)
    monkeypatch.setattr("sglang_optimal.mixing.series._BLOCK_ELEMENTS", 120)
    assert torch.equal(more_series(NAMES, sides, tokens), whole[0]) and torch.equal(
        top_k("mixture", 5, sides), whole[1]
    )


def test_sampling_may_have_overwritten_the_mixture():
    torch.manual_seed(6)
    teacher, student, one = torch.randn(2, 30), torch.randn(2, 30), torch.ones(2)
    mixture = mix(teacher, student, one, AlphaParams.uniform(2))
    q = mixture.logits.clone()
    mixture.logits.fill_(torch.nan)
    sides = Sides(mixture, teacher, student, one)
    assert torch.allclose(sides.mixture_logits(), q) and top_k("mixture", 3, sides).isfinite().all()
    assert more_series(NAMES, sides, torch.tensor([1, 2])).isfinite().all()


def test_nothing_asked_and_an_unknown_name():
    one = torch.ones(1)
    sides = Sides(mix(one.view(1, 1), one.view(1, 1), one, AlphaParams.uniform(1)), one.view(1, 1), one.view(1, 1), one)
    assert more_series([], sides, torch.tensor([0])).shape == (1, 0)
    with pytest.raises(KeyError):
        more_series(["teacher_mood"], sides, torch.tensor([0]))


def test_decoding_what_a_server_sends_of_nothing():
    assert decode_top_k({}) == {}
    assert decode_top_k({"teacher": {"ids": []}})["teacher"]["ids"].shape == (0, 0)
