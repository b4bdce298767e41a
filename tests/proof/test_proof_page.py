"""docs/proof.md says what the result lines say, and nothing else."""

from __future__ import annotations

import re

import pytest
from made_lines import line

from bench.proof import page as module
from bench.proof.hypotheses import HYPOTHESES, WRITTEN, Arm
from bench.proof.page import NOT_RUN, PAGE, page, rendered
from bench.proof.plan import PARTS
from bench.proof.policies import POLICIES
from bench.proof.rounds import BUDGETS, ROUND_ARMS, TOP_K
from bench.proof.sources import VARIANTS
from bench.proof.tasks import TASKS


def rows(text: str, block: str) -> list[list[str]]:
    inner = text.partition(f"<!-- proof:{block} -->")[2].partition(f"<!-- /proof:{block} -->")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in inner.splitlines() if row.startswith("|")]


def test_the_page_is_generated():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m bench.proof.page"
    assert page(page()) == page()


def test_without_lines_there_are_no_figures():
    text = rendered(PAGE.read_text(encoding="utf-8"), {"cpu": [], "gpu": []})
    for scale in ("cpu", "gpu"):
        table = rows(text, f"hypotheses-{scale}")[2:]
        assert [row[0] for row in table] == [each.name for each in HYPOTHESES]
        assert all(row[3:] == [NOT_RUN, "", "", ""] for row in table)
        block = text.partition(f"<!-- proof:results-{scale} -->\n")[2].partition("<!--")[0]
        assert block == "Not run yet.\n"
    assert text.count(f"Written down on {WRITTEN}.") == 2


def test_figures_of_lines():
    """H2: the mixture alone solves 15 of 20 problems in each of three seeds, rejection sampling alone none."""
    made = []
    for seed in range(3):
        made.append(line(Arm("one-step", "mix"), seed, solved_problems="1" * 20, passes=1000 + seed, trained_samples=7,
                         trained_tokens=300, followed_problems="1" * 5 + "0" * 15))  # fmt: skip
        made.append(line(Arm("one-step", "rs"), seed, solved_problems="1" * 5 + "0" * 15, passes=900))
    made.append(line(Arm("one-step", "nothing", "all", "untrained"), solved_problems="0" * 16 + "1" * 4))
    made.append(line(
        Arm("one-step", "mix", kind="data"), samples=16, passes=1000, covered=6, problems=8, accepted=10, sound=5,
        surprises=4, surprises_of=10, covered_problems="11111100",
    ))  # fmt: skip
    text = rendered(PAGE.read_text(encoding="utf-8"), {"cpu": made, "gpu": []})
    found = {row[0]: row for row in rows(text, "hypotheses-cpu")}["H2"]
    assert found[3] == "supported" and found[4].startswith("+75.0 (+") and found[5:] == ["45 : 0", "0.000"]
    data, mix, rs, nothing = [row for row in rows(text, "results-cpu") if row[0] in ("mix", "rs", "nothing")]
    assert data == ["mix", "1", "16", "1,000", "6 of 8", "10", "50%", "40%"]
    assert mix == ["mix", "passes", "3", "1,001", "7", "300", "100.0% (94.0%–100.0%)", "20, 20, 20", "25%", "100%"]
    assert rs[6:] == ["25.0% (15.8%–37.2%)", "5, 5, 5", "0%", "0%"] and nothing[6].startswith("20.0% (")
    assert "small, 2 cores of Some CPU, 2026-12-01, 4 minutes; torch 2.0." in text
    assert rows(text, "hypotheses-gpu")[2][3] == NOT_RUN


@pytest.mark.filterwarnings("error")
def test_nothing_is_retained_of_nothing():
    made = [line(Arm("two-step", "nothing", "all", "untrained"), solved_problems="0" * 20)]
    made += [line(Arm("two-step", "mix"), solved_problems="1" * 2 + "0" * 18, passes=1000, trained_samples=7,
                  trained_tokens=300)]  # fmt: skip
    text = rendered(PAGE.read_text(encoding="utf-8"), {"cpu": made, "gpu": []})
    assert [row[-1] for row in rows(text, "results-cpu") if row[0] in ("nothing", "mix")] == ["", ""]


def test_a_page_without_a_block_is_refused():
    with pytest.raises(ValueError, match="no block 'hypotheses-cpu'"):
        rendered("<!-- proof:plan -->\n<!-- /proof:plan -->\n", {"cpu": [], "gpu": []})


def test_what_is_written_by_hand_is_so():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| ([\w.-]+(?:, [\w.-]+)*) \|", text, re.MULTILINE))
    named = {name for each in named for name in each.split(", ")}
    assert set(POLICIES) | set(ROUND_ARMS) | set(TASKS) <= named
    assert all(f"…-{variant}" in text for variant in VARIANTS if variant != "plain")
    assert ", ".join(map(str, BUDGETS)) + " nats" in text and f"({TOP_K} likeliest" in text
    assert len(HYPOTHESES) == 12 and "With twelve comparisons" in text
    plan = rows(text, "plan")[2:]
    assert len(plan) == len(PARTS)
    total = sum(float(row[3]) for row in plan)
    assert abs(total - float(plan[-1][4])) <= len(plan) / 2


def test_the_command_writes_it(tmp_path, monkeypatch):
    text = re.sub(r"not run yet", "won by far", PAGE.read_text(encoding="utf-8"))
    (tmp_path / "proof.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", tmp_path / "proof.md")
    assert module.main([]) == 0
    assert "won by far" not in (tmp_path / "proof.md").read_text(encoding="utf-8").partition("## Expected")[2]
