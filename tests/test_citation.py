"""CITATION.cff, and docs/related_work.md: sources, links, and what it says of TRL."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import sglang_optimal

REPOSITORY = Path(__file__).parents[1]
CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
RELATED = (REPOSITORY / "docs" / "related_work.md").read_text(encoding="utf-8")
ARXIV = r"\d{4}\.\d{4,5}"


def test_the_version_is_the_package_s():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert str(CITATION["version"]) == project["version"] == sglang_optimal.__version__
    assert CITATION["license"] == project["license"]


def test_citation_has_what_the_format_wants():
    """Citation File Format 1.2.0: the keys it requires, and names of persons or entities."""
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    for work in (CITATION, *CITATION["references"]):
        assert work["title"] and work["authors"]
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    assert CITATION["message"] and all(work["type"] and work["year"] for work in CITATION["references"])


def test_the_readme_cites_the_same_title():
    readme = " ".join(
        (REPOSITORY / "README.md").read_text().replace("\\", "").replace("{", "").replace("}", "").split()
    )
    assert CITATION["title"] in readme


def test_every_row_has_a_source():
    table = [line for line in RELATED.splitlines() if line.startswith("| ")][1:]
    without = [row for row in table if not re.search(rf"\[{ARXIV}\]\(", row)]
    # Of no single paper: plain fine-tuning, and a trainer of TRL's.
    assert [row.split(" | ")[0] for row in without] == [
        "| plain SFT on given solutions",
        "| GOLD (TRL's `GOLDTrainer`)",
    ]
    assert len(table) >= 15
    for shown, address in re.findall(rf"\[({ARXIV})\]\(([^)]+)\)", RELATED):
        assert address == f"https://arxiv.org/abs/{shown}"
    assert set(re.findall(rf"arXiv ({ARXIV})", (REPOSITORY / "docs" / "theory.md").read_text())) <= set(
        re.findall(ARXIV, RELATED)
    )


def test_what_it_says_of_trl():
    """Of the release that it names."""
    trl = pytest.importorskip("trl")
    assert f"TRL {trl.__version__}'s source" in RELATED
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdpo import SDPOTrainer

    for trainer in (GKDTrainer, GOLDTrainer, SDFTTrainer, SDPOTrainer):
        assert f"`{trainer.__name__}`" in RELATED
    defaults = {field.name: field.default for field in dataclasses.fields(SDFTConfig)}
    assert defaults["generate_from_teacher"] is False
    gkd, gold = ({field.name for field in dataclasses.fields(config)} for config in (GKDConfig, GOLDConfig))
    assert {"lmbda", "beta"} <= gkd and {"lmbda", "beta", "teacher_tokenizer_name_or_path", "use_uld_loss"} <= gold


def test_methods_and_losses_that_it_names():
    from sglang_optimal.config import SETTINGS
    from sglang_optimal.train.objective import LOSSES

    assert {"jsd", "policy_gradient", "mixture_kl"} <= set(LOSSES)
    for name in ("fixed_alpha", "alpha_method", "mixing_mode"):
        assert f"`{name}" in RELATED and name in {*SETTINGS, "fixed_alpha", "alpha_method"}
