"""Which samples each arm takes, and what they cost."""

from __future__ import annotations

from bench.proof.plan import data_arms, split
from bench.proof.policies import MEASURE, POLICIES, Stage, Taken, cut, take
from bench.proof.sources import SOURCES, VARIANTS, Drawn
from bench.proof.tasks import TASKS

PROBLEMS = ["a", "b"]


def drawn(source: str, problem: str, index: int, tokens: int, accepted: str = "") -> Drawn:
    """accepted: p(lain), s(ound), n(ospike)."""
    return Drawn(source, problem, index, tokens, {name: name[0] in accepted for name in VARIANTS}, None)


def pools() -> dict[str, dict[str, list[Drawn]]]:
    """The student solves a with its second sample, not soundly; the teacher both at once."""
    return {
        "student": {
            "a": [drawn("student", "a", 0, 10), drawn("student", "a", 1, 20, "p"), drawn("student", "a", 2, 1, "psn")],
            "b": [drawn("student", "b", 0, 30), drawn("student", "b", 1, 40), drawn("student", "b", 2, 50)],
        },
        "teacher": {
            "a": [drawn("teacher", "a", 0, 5, "psn")], "b": [drawn("teacher", "b", 0, 6, "ps")],
        },
        "mixture": {"a": [drawn("mixture", "a", 0, 7, "psn")], "b": [drawn("mixture", "b", 0, 8)]},
    }  # fmt: skip


def names(taken: Taken) -> list[str]:
    return [f"{each.source}/{each.problem}/{each.index}" for each in taken.samples]


def test_in_rounds_over_the_problems():
    taken = take(POLICIES["rs"], pools(), PROBLEMS, "plain")
    assert names(taken) == [f"student/{p}/{i}" for i in range(3) for p in "ab"]
    assert (taken.passes, taken.tokens, taken.accepted_tokens) == (151, 151, 21)
    assert taken.covered(PROBLEMS) == "10"


def test_a_budget_ends_before_the_sample_that_would_go_beyond():
    for budget, count in ((0, 0), (9, 0), (10, 1), (39, 1), (40, 2), (59, 2), (60, 3), (10_000, 6)):
        taken = take(POLICIES["rs"], pools(), PROBLEMS, "plain", budget)
        assert len(taken.samples) == count and taken.passes <= budget


def test_rationalisation_asks_the_teacher_for_the_rest():
    taken = take(POLICIES["star"], pools(), PROBLEMS, "plain")
    assert names(taken) == ["student/a/0", "student/b/0", "student/a/1", "student/b/1", "teacher/b/0"]
    assert taken.passes == 10 + 30 + 20 + 40 + 6 and taken.covered(PROBLEMS) == "11"


def test_a_filter_makes_more_problems_unsolved():
    """The student's text of a is not sound, so the teacher is asked for it too."""
    taken = take(POLICIES["star"], pools(), PROBLEMS, "sound")
    assert names(taken)[4:] == ["teacher/a/0", "teacher/b/0"]
    assert [each.source for each in taken.accepted] == ["teacher", "teacher"]


def test_passes_of_a_token():
    """The mixture takes two; the teacher alone one, and two where the student has to judge what it wrote."""
    assert drawn("mixture", "a", 0, 7).passes("plain") == 14
    assert drawn("student", "a", 0, 7).passes("nospike") == 7
    assert [drawn("teacher", "a", 0, 7).passes(variant) for variant in ("plain", "sound", "nospike")] == [7, 7, 14]
    assert drawn("shuffled", "a", 0, 7).passes("plain") == 14


def test_escalation_goes_on_where_the_last_step_failed():
    """b fails the student twice and the mixture once."""
    stages = (
        Stage("student", 1), Stage("student", 1, unsolved=True), Stage("mixture", 1, unsolved=True),
        Stage("teacher", None, unsolved=True),
    )  # fmt: skip
    taken = take(stages, pools(), PROBLEMS, "plain")
    assert names(taken) == [
        "student/a/0", "student/b/0", "student/a/1", "student/b/1", "mixture/b/0", "teacher/b/0",
    ]  # fmt: skip
    sources = [stage.source for stage in POLICIES["escalation"]]
    assert sources == ["student", "student", "budget-0.1", "budget-0.5", "mixture", "teacher"]
    assert not POLICIES["escalation"][0].unsolved and all(stage.unsolved for stage in POLICIES["escalation"][1:])


def test_a_problem_without_samples_is_passed_by():
    """A refused request, say."""
    only = {"student": {"b": [drawn("student", "b", 0, 3, "p")]}}
    assert names(take(POLICIES["rs"], only, PROBLEMS, "plain")) == ["student/b/0"]
    assert take(POLICIES["rs"], {"student": {}}, PROBLEMS, "plain").samples == ()


def test_cut_to_tokens():
    samples = [drawn("mixture", str(i), 0, 10, "p") for i in range(20)]
    kept = cut(samples, 55, 0)
    assert len(kept) == 5 and cut(list(reversed(samples)), 55, 0) == kept, "the order of the samples does not matter"
    assert cut(samples, 55, 1) != kept
    assert cut(samples, 9, 0) == [] and len(cut(samples, 200, 0)) == 20
    uneven = [drawn("mixture", "a", 0, 100), drawn("mixture", "b", 0, 3)]
    assert [each.problem for each in cut(uneven, 50, 0)] == ["b"], "what is too long is left out, not what follows"


def test_names_of_arms():
    assert split("mix-sound") == ("mix", "sound") and split("budget-0.1") == ("budget-0.1", "plain")
    assert split("budget-0.1-nospike") == ("budget-0.1", "nospike") and split("rs") == ("rs", "plain")
    for task in TASKS.values():
        for arm in data_arms(task.name):
            policy, variant = split(arm)
            assert variant in VARIANTS and {stage.source for stage in POLICIES[policy]} <= set(task.sources)
    assert "shuffled-sound" in data_arms("one-step") and "escalation-nospike" in data_arms("two-step")
    assert data_arms("rule") == ["mix", "teacher"] and data_arms("skilled") == []


def test_rejection_sampling_has_as_many_passes_as_the_mixture():
    """Samples of one length: two mixed ones are four passes, and the student's pool has one to spare."""
    (stage,) = POLICIES[MEASURE]
    assert SOURCES["student"].n * SOURCES["student"].models > SOURCES[stage.source].n * SOURCES[stage.source].models
