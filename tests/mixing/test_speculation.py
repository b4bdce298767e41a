"""Speculative sampling draws from the target, whatever is proposed, and the test would notice if it did not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from sglang_optimal.mixing import speculation
from sglang_optimal.mixing.speculation import draw, verify, verify_greedy

V, K, DRAWS = 7, 3, 60_000


def test_draw():
    torch.manual_seed(3)
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0, 4.0])
    counts = torch.bincount(draw(weights.expand(DRAWS, -1)), minlength=5)
    assert counts[0] == counts[3] == 0
    assert chisquare(counts[[1, 2, 4]], [DRAWS / 8, DRAWS * 3 / 8, DRAWS / 2]).pvalue > 1e-5


def test_draw_from_many():
    """Wider than a block; mass at both ends of one, rows of different sums, and nothing where there is no weight."""
    torch.manual_seed(4)
    weights = torch.zeros(2, 700)
    weights[0, [0, 255, 256, 511, 699]] = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])
    weights[1, 300] = 1e-6
    drawn = draw(weights.repeat(DRAWS // 2, 1)).view(-1, 2)
    counts = torch.bincount(drawn[:, 0], minlength=700)
    assert chisquare(counts[weights[0] > 0], weights[0][weights[0] > 0].double() * DRAWS / 40).pvalue > 1e-5
    assert counts[weights[0] == 0].sum() == 0 and bool((drawn[:, 1] == 300).all())


def distributions(seed: int, sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q [K+1, V] and p [K, V] with some zeros on either side."""
    torch.manual_seed(seed)
    q = (torch.randn(K + 1, V) * sharpness).softmax(-1)
    p = (torch.randn(K, V) * sharpness).softmax(-1)
    q[0, 1] = p[0, 2] = p[1, 1] = q[2, 4] = 0.0
    return q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)


def misfit(q: torch.Tensor, p: torch.Tensor) -> list[float]:
    """Chi-square p-values, for each position, of the tokens that were emitted there: they must fit q.

    At position i only the rows count that got so far; which they are does not depend on what they draw there.
    """
    drafts = torch.stack([draw(row.expand(DRAWS, -1)) for row in p])
    tokens, accepted = verify(q.unsqueeze(1).expand(-1, DRAWS, -1), p.unsqueeze(1).expand(-1, DRAWS, -1), drafts)
    values = []
    for position in range(K + 1):
        there = accepted >= position
        counts = torch.bincount(tokens[position][there], minlength=V).double()
        expected = q[position].double() * counts.sum() / q[position].double().sum()
        possible = expected > 0
        if counts[~possible].sum() > 0:
            values.append(0.0)
        elif counts.sum() > 100:
            values.append(float(chisquare(counts[possible], expected[possible]).pvalue))
    return values


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_every_position_is_drawn_from_the_target(seed, sharpness):
    values = misfit(*distributions(seed, sharpness))
    assert len(values) >= 2 and min(values) > 1e-5


MUTANTS = {
    "the residual is the target itself": ("(weights - draft_probs[", "(weights - 0 * draft_probs["),
    "the residual is not cut at zero": (".clamp_(min=0.0)", ".abs_()"),
    "always accepted": ("* p < q", "* p < 2 * q"),
    "accepted too seldom": ("* p < q", "* p < 0.8 * q"),
    "after all drafts the last target": (
        "weights = target_probs[num_accepted, column]",
        "weights = target_probs[num_accepted.clamp(max=k-1), column]",
    ),
    "the proposal of the next position": (
        "draft_probs[num_accepted.clamp(max=k - 1)",
        "draft_probs[(num_accepted + 1).clamp(max=k - 1)",
    ),
}


@pytest.mark.parametrize(
    "name", [next(iter(MUTANTS)), *(pytest.param(name, marks=pytest.mark.slow) for name in list(MUTANTS)[1:])]
)
def test_a_wrong_residual_or_acceptance_is_noticed(name, monkeypatch):
    """The same statistic on a broken copy of `verify` fails: so it has the power to tell."""
    import inspect
    import textwrap

    right, wrong = MUTANTS[name]
    source = textwrap.dedent(inspect.getsource(speculation.verify))
    assert source.count(right) == 1, right
    scope = vars(speculation).copy()
    exec(source.replace(right, wrong), scope)
    monkeypatch.setitem(globals(), "verify", scope["verify"])
    assert min(min(misfit(*distributions(seed, 2.0))) for seed in range(4)) < 1e-12


def test_equal_distributions_are_always_accepted():
    q, _ = distributions(1, 1.0)
    q = q.unsqueeze(1).expand(-1, 5000, -1)
    drafts = torch.stack([draw(q[i]) for i in range(K)])
    tokens, accepted = verify(q, q[:K], drafts)
    assert bool((accepted == K).all()) and torch.equal(tokens[:K], drafts)


@pytest.mark.parametrize(
    ("target", "draft", "token_ids"),
    [
        ((K, 2, V), (K, 2, V), (K, 2)),
        ((K + 1, 2, V), (K, 2, V + 1), (K, 2)),
        ((K + 1, 2, V), (K, 3, V), (K, 2)),
        ((1, 2, V), (0, 2, V), (0, 2)),
    ],
)
def test_shapes_that_do_not_fit(target, draft, token_ids):
    with pytest.raises(ValueError, match="^target_probs, draft_probs, draft_token_ids: must be .* got"):
        verify(torch.zeros(target), torch.zeros(draft), torch.zeros(token_ids, dtype=torch.int64))
    with pytest.raises(ValueError, match="^target_token_ids, draft_token_ids: must be"):
        verify_greedy(torch.zeros(K, 2), torch.zeros(K, 2))


def test_rounding_leaves_no_empty_residual():
    """A rejection where q and p agree but for rounding draws from q: nothing else is left."""
    p = torch.tensor([[[0.5, 0.5]]])
    q = torch.tensor([[[0.5, 0.5 - 6e-8]], [[1.0, 0.0]]])
    torch.manual_seed(0)
    tokens, _ = verify(q.expand(-1, 4000, -1), p.expand(-1, 4000, -1), torch.ones((1, 4000), dtype=torch.int64))
    assert set(tokens[0].tolist()) <= {0, 1}


@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=2, max_size=5), st.data())
@settings(max_examples=60)
def test_greedy_keeps_the_common_beginning(best, data):
    """Rows are lists of positions here; what is emitted is the target's own tokens."""
    best = torch.tensor(best)
    drafts = torch.tensor([[data.draw(st.integers(0, 2)) for _ in row] for row in best[:-1]])
    tokens, accepted = verify_greedy(best, drafts)
    for row in range(best.shape[1]):
        expected = 0
        while expected < len(drafts) and drafts[expected, row] == best[expected, row]:
            expected += 1
        assert accepted[row] == expected
    assert torch.equal(tokens, best)
