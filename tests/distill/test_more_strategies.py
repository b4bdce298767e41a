"""What may change in a run that is there: strategies are added where ids allow it, the rest is refused."""

from __future__ import annotations

import json

import pytest
from made_runs import config_of
from stub_server import stub_server
from test_run import PROBLEMS, Folder

from sglang_optimal.distill.pipeline import seed_of
from sglang_optimal.distill.settings import fingerprint, grown, is_same

A = {"name": "a", "teacher": "{problem} {answer}"}
B = {"name": "b", "teacher": "{answer} {problem}", "student": "{problem}?"}
C = {"name": "c", "teacher": "{answer}"}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def contexts(*strategies, **more):
    return {"student": "{problem}", "strategies": list(strategies), **more}


def test_another_strategy_adds_its_samples(folder, capsys):
    folder.configure(contexts=contexts(A, select="cross"))
    with stub_server() as stub:
        assert folder.run(stub.url) == 0
        old = folder.rows()
        assert len(old) == 3 * PROBLEMS
        folder.configure(contexts=contexts(C, A | {"weight": 3.0}, B, select="cross"))
        assert folder.run(stub.url) == 0
        rows = folder.rows()
        assert len(rows) == 9 * PROBLEMS and rows.items() >= old.items()
        assert set(stub.seen) == {seed_of(0, name) for name in rows} and set(stub.seen.values()) == {1}
        manifest = json.loads((folder.out / "run.json").read_text())
        assert [s["name"] for s in manifest["config"]["contexts"]["strategies"]] == ["c", "a", "b"]
        assert manifest["planned"] == 9 * PROBLEMS
        folder.configure(contexts=contexts(A, select="cross"))  # and no way back: its ids are not all there are
        assert folder.run(stub.url) == 2
        assert "contexts.strategies" in capsys.readouterr().err


def test_from_sample_to_cross(folder, capsys):
    """What was drawn is a part of all: ids and seeds are the same."""
    with stub_server() as stub:
        folder.configure(contexts=contexts(A, B | {"weight": 2.0}))
        assert folder.run(stub.url) == 0
        old = folder.rows()
        folder.configure(contexts=contexts(A, B | {"weight": 2.0}, C))
        assert folder.run(stub.url) == 2
        said = capsys.readouterr().err
        assert "other settings (contexts.strategies)" in said and "contexts.select: cross" in said
        folder.configure(contexts=contexts(A, B, C, select="cross"))
        assert folder.run(stub.url) == 0
        rows = folder.rows()
        assert len(rows) == 9 * PROBLEMS and rows.items() >= old.items() and set(stub.seen.values()) == {1}


OLD = config_of(contexts=contexts(A, B, select="cross"))


@pytest.mark.parametrize(
    ("sections", "may"),
    [
        ({"contexts": contexts(B, A, C, select="cross")}, True),
        ({"contexts": contexts(A, select="cross")}, False),
        ({"contexts": contexts(A, B, C)}, False),
        ({"contexts": contexts(A | {"teacher": "{answer}!"}, B, C, select="cross")}, False),
        ({"contexts": contexts(A, B | {"student": None}, C, select="cross")}, False),
        ({"contexts": contexts(A, B, C, select="cross") | {"student": "{problem}!"}}, False),
        ({"contexts": contexts(A, B, C, select="cross", guard=False)}, False),
        ({"contexts": contexts(A, B, C, select="cross"), "sampling": {"temperature": 0.5}}, False),
        ({"contexts": contexts(A, B, C, select="cross"), "sampling": {"n": 5}, "client": {"concurrency": 3}}, True),
        ({"contexts": contexts(A, B, C, select="cross"), "filters": [{"type": "finish"}]}, False),
        ({"contexts": contexts(A, B, select="cross"), "filters": [{"type": "finish"}]}, False),
    ],
)
def test_the_rule(sections, may):
    new = config_of(**sections)
    manifest = {"fingerprint": fingerprint(OLD), "config": OLD.model_dump(mode="json")}
    assert is_same(manifest, new) is may
    assert grown(OLD, new) is may


def test_keys_that_later_versions_add_have_their_defaults():
    """A run of a version whose settings, and fingerprint, lacked a key of today is the same run."""
    values = OLD.model_dump(mode="json")
    del values["contexts"]["guard"], values["sampling"]["min_p"], values["select"]
    assert is_same({"fingerprint": "of before", "config": values}, OLD)
    values["sampling"]["top_p"] = 0.5
    assert not is_same({"fingerprint": "of before", "config": values}, OLD)
    values["sampling"]["of_tomorrow"] = 1
    assert not is_same({"fingerprint": "of tomorrow", "config": values}, OLD)
    assert not is_same({"fingerprint": "of nothing"}, OLD)
