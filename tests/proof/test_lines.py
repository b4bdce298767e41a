"""Result lines: written at once, read after a kill, and never of two settings in one file."""

from __future__ import annotations

import dataclasses
import json

import pytest
from made_lines import line

from bench.proof.lines import KEY, Results, key_of, read
from bench.proof.scales import SCALES

SCALE = SCALES["smoke"]


def cell(**more):
    return {name: line()[name] for name in KEY} | more


def test_written_and_read_again(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    results = Results(path, SCALE, "small")
    results.append(cell(solved_problems="0110", seconds=1.5))
    (again,) = Results(path, SCALE, "small").lines
    assert again == results.lines[0] and results.has(key_of(again)) and not results.has(key_of(again | {"seed": 1}))
    assert (again["solved"], again["held_out"]) == (2, 4)
    # Wilson's interval of 2 of 4: centre 1/2, half width z·√(1/16 + z²/64)/(1 + z²/4) with z = 1.96.
    half = 1.96 * (1 / 16 + 1.96**2 / 64) ** 0.5 / (1 + 1.96**2 / 4)
    assert again["solved_interval"] == [round(0.5 - half, 4), round(0.5 + half, 4)]
    assert (again["scale"], again["settings"], again["model"]) == ("smoke", SCALE.settings, "small")
    assert again["cpu"] and again["cores"] >= 1 and again["time"].startswith("20")
    assert {"sglang", "torch", "transformers", "peft", "sglang_optimal"} == set(again["versions"])


def test_a_line_that_a_kill_left_half_is_none(tmp_path):
    path = tmp_path / "lines.jsonl"
    results = Results(path, SCALE, "small")
    results.append(cell())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(read(path)) == 1
    again = Results(path, SCALE, "small")
    again.append(cell(seed=1))
    assert [each["seed"] for each in read(path)] == [0, 1]


@pytest.mark.parametrize("damage", ["{}\n", "no json\n", "[1]\n", "twice"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "lines.jsonl"
    Results(path, SCALE, "small").append(cell())
    text = path.read_text()
    path.write_text(text + (text if damage == "twice" else damage))
    with pytest.raises(ValueError, match=r"lines.jsonl, line 2: "):
        Results(path, SCALE, "small")


def test_lines_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    Results(path, SCALE, "small").append(cell())
    with pytest.raises(ValueError, match="--results: .* lines of other settings"):
        Results(path, dataclasses.replace(SCALE, steps=SCALE.steps + 1), "small")


def test_no_nan_is_written(tmp_path):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(ValueError):
        Results(path, SCALE, "small").append(cell(train_loss=float("nan")))
    assert json.dumps(read(path)) == "[]"
