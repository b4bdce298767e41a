"""Verdicts that are worked out by hand, of made-up result lines."""

from __future__ import annotations

import numpy as np
import pytest
from made_lines import line

from bench.proof.analysis import RESAMPLES, judge, resampled
from bench.proof.hypotheses import HYPOTHESES, MARGIN, Arm, Hypothesis
from bench.proof.plan import cells
from bench.proof.scales import SCALES

A, B = Arm("one-step", "mix"), Arm("one-step", "rs")


def hypothesis(wanted: str = "more", metric: str = "solved") -> Hypothesis:
    return Hypothesis("H", "a is better", metric, A, B, wanted, "")


def lines(a: list[str], b: list[str]) -> list[dict]:
    """Of seeds 0, 1, …: what each arm solves."""
    return [line(arm, seed, solved_problems=bits) for arm, all in ((A, a), (B, b)) for seed, bits in enumerate(all)]


def test_supported():
    """Three seeds of two problems, all solved by a alone: 6 pairs, p = 2 / 2^6 = 0.03125."""
    found = judge(hypothesis(), lines(["11"] * 3, ["00"] * 3))
    assert (found.state, found.seeds, found.difference, found.low, found.high) == ("supported", 3, 1, 1, 1)
    assert (found.only_a, found.only_b, found.p) == (6, 0, 0.03125)


def test_contradicted():
    found = judge(hypothesis(), lines(["00"] * 3, ["11"] * 3))
    assert (found.state, found.difference, found.high, found.p) == ("contradicted", -1, -1, 0.03125)
    assert (found.only_a, found.only_b) == (0, 6)


def test_not_decided_though_the_interval_is_above_0():
    """Three pairs: p = 2 / 2^3 = 0.25."""
    found = judge(hypothesis(), lines(["1"] * 3, ["0"] * 3))
    assert (found.state, found.low, found.p) == ("not decided", 1, 0.25)


def test_not_decided_where_they_are_even():
    found = judge(hypothesis(), lines(["1100"] * 3, ["0011"] * 3))
    assert (found.state, found.difference, found.only_a, found.only_b, found.p) == ("not decided", 0, 6, 6, 1.0)
    assert found.low < 0 < found.high


def test_one_solid_seed_does_not_carry_two_that_say_nothing():
    """Two seeds are even, one is all a: of three seeds drawn none is that one in (2/3)^3 = 30 %, so 0 is within."""
    found = judge(hypothesis(), lines(["1" * 8, "1" * 8, "1" * 8], ["0" * 8, "1" * 8, "1" * 8]))
    assert found.p == pytest.approx(2 / 2**8) and found.low == 0
    assert found.state == "not decided"


def test_too_few_seeds_decide_nothing():
    found = judge(hypothesis(), lines(["1" * 20] * 2, ["0" * 20] * 2))
    assert (found.state, found.seeds) == ("not decided", 2) and found.p < 1e-9


def test_only_seeds_that_both_arms_have_count():
    of_both = lines(["11"] * 3, ["00"] * 3)
    more = [*of_both, line(A, 3, solved_problems="00"), line(B, 4, solved_problems="11")]
    assert judge(hypothesis(), more) == judge(hypothesis(), of_both)


def test_nothing_was_run():
    found = judge(hypothesis(), [line(A, 0, solved_problems="11")])
    assert (found.state, found.seeds, found.difference, found.p) == ("not run yet", 0, None, None)


@pytest.mark.parametrize(
    ("a", "b", "state"),
    [("1" * 10, "1" * 10, "supported"), ("0" * 10, "1" * 10, "contradicted"), ("1100", "0011", "not decided")],
)
def test_no_less(a, b, state):
    """Within 5 points: equal arms are, one that solves nothing is not, and ±100 points decide nothing."""
    assert MARGIN == 0.05
    assert judge(hypothesis("no less"), lines([a] * 3, [b] * 3)).state == state


def test_other_lines_do_not_count():
    """Another level, round, task or kind is another arm."""
    others = [
        line(Arm(**{**vars(A), name: value}), seed, solved_problems="11")
        for name, value in (("level", "tokens"), ("round", 1), ("task", "rule"), ("kind", "rounds"))
        for seed in range(3)
    ]  # fmt: skip
    assert judge(hypothesis(), [*others, *lines([], ["00"] * 3)]).state == "not run yet"


def test_retained_is_of_what_the_untrained_student_solves():
    """It solves the first two of four; a keeps both, b one of them, in three seeds: 3 pairs to none, p = 0.25."""
    before = line(Arm("one-step", "nothing", "all", "untrained"), solved_problems="1100")
    made = [before, *lines(["1100"] * 3, ["0111"] * 3)]
    found = judge(hypothesis(metric="retained"), made)
    assert (found.difference, found.only_a, found.only_b, found.p) == (0.5, 3, 0, 0.25)
    assert judge(hypothesis(metric="retained"), made[1:]).state == "not run yet"
    made[0] = line(Arm("one-step", "nothing", "all", "untrained"), solved_problems="0000")
    assert judge(hypothesis(metric="retained"), made).state == "not run yet"


def test_followed_and_covered_are_their_own_columns():
    made = [
        line(arm, seed, solved_problems="00", followed_problems=followed, covered_problems=covered)
        for arm, followed, covered in ((A, "11", "00"), (B, "00", "11")) for seed in range(3)
    ]  # fmt: skip
    assert judge(hypothesis(metric="followed"), made).state == "supported"
    assert judge(hypothesis(metric="covered"), made).state == "contradicted"


def test_arms_of_other_problems_are_refused():
    with pytest.raises(ValueError, match="H: the arms have other problems"):
        judge(hypothesis(), lines(["111"] * 3, ["00"] * 3))


def test_the_bootstrap_draws_held_out_problems_once_for_all_seeds():
    """One problem that a alone solves, one that b alone does, in two seeds alike. Drawn once: a mean of ±1 in a quarter
    of the resamples each. Drawn for each seed: the two seeds are one (in half of the resamples) and ±1 is a quarter
    each, or two, and it is a sixteenth each: 5/32."""
    differences = [np.array([1, -1])] * 2
    for crossed, share in ((True, 1 / 4), (False, 5 / 32)):
        means = resampled(differences, crossed=crossed)
        assert len(means) == RESAMPLES
        for value in (-1.0, 1.0):
            assert (means == value).mean() == pytest.approx(share, abs=0.02)
    assert (resampled(differences, crossed=True) == resampled(differences, crossed=True)).all()


def test_the_matrix_decides_every_hypothesis():
    scale = SCALES["cpu"]
    planned = {cell.key for cell in cells(scale)}
    assert len({each.name for each in HYPOTHESES}) == len(HYPOTHESES) and len(scale.seeds) >= 3
    for each in HYPOTHESES:
        assert each.metric in ("solved", "followed", "retained", "covered") and each.wanted in ("more", "no less")
        assert (each.metric == "covered") == (each.a.kind == "data" == each.b.kind)
        for arm in (each.a, each.b):
            for seed in scale.seeds:
                assert (arm.kind, arm.task, arm.arm, arm.level, seed, arm.round) in planned, each.name
