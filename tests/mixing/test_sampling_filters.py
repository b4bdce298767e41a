"""Which tokens are left, and with what weight: sorted as in PyTorch's sampler, by kernels as in flashinfer's.

The kernels here are plain PyTorch that compares every token with every other. flashinfer's own need a GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import filter_probs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sglang_optimal.mixing.filters import Kernels, SamplingFilters

ALL = 1 << 30  # SGLang's "no top-k"


def renormalised(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True)


def top_k_kernel(probs: Tensor, top_k: Tensor) -> Tensor:
    """A token stays if fewer than k are more likely: equals stay together."""
    above = (probs.unsqueeze(-2) > probs.unsqueeze(-1)).sum(-1)
    return renormalised(torch.where(above < top_k.unsqueeze(-1), probs, 0.0))


def top_p_kernel(probs: Tensor, top_p: Tensor) -> Tensor:
    """A token stays if those that are more likely have less than p of the mass; all do for p = 1."""
    above = torch.where(probs.unsqueeze(-2) > probs.unsqueeze(-1), probs.unsqueeze(-2), 0.0).double().sum(-1)
    limit = top_p.double().unsqueeze(-1)
    return renormalised(torch.where((above < limit * probs.double().sum(-1, keepdim=True)) | (limit >= 1), probs, 0.0))


def test_the_kernels_here_do_what_flashinfers_documentation_shows():
    """The examples in the docstrings of ``top_p_renorm_probs`` (p = 0.3) and ``top_k_renorm_probs`` (k = 3)."""
    probs = torch.tensor(
        [
            [0.2499, 0.2592, 0.1085, 0.2718, 0.1106],
            [0.2205, 0.0942, 0.2912, 0.3452, 0.0489],
            [0.2522, 0.1602, 0.2346, 0.1532, 0.2000],
            [0.1543, 0.3182, 0.2062, 0.0958, 0.2255],
        ]
    )
    top_p = [
        [0.0000, 0.4882, 0.0000, 0.5118, 0.0000],
        [0.0000, 0.0000, 0.0000, 1.0000, 0.0000],
        [0.5181, 0.0000, 0.4819, 0.0000, 0.0000],
        [0.0000, 1.0000, 0.0000, 0.0000, 0.0000],
    ]
    top_k = [
        [0.3201, 0.3319, 0.0000, 0.3480, 0.0000],
        [0.2573, 0.0000, 0.3398, 0.4028, 0.0000],
        [0.3672, 0.0000, 0.3416, 0.0000, 0.2912],
        [0.0000, 0.4243, 0.2750, 0.0000, 0.3007],
    ]
    assert torch.allclose(top_p_kernel(probs, torch.full((4,), 0.3)), torch.tensor(top_p), atol=1e-4)
    assert torch.allclose(top_k_kernel(probs, torch.full((4,), 3)), torch.tensor(top_k), atol=1e-4)


def rows(*settings: dict, kernels: str | None = None, **fields) -> SamplingFilters:
    """SamplingFilters of one row for each settings; ``kernels``: "joint", "in turn", or None to sort."""

    def column(name: str, default: float, dtype=torch.float32) -> Tensor:
        return torch.tensor([row.get(name, default) for row in settings], dtype=dtype)

    def used(name: str) -> bool:
        return any(name in row for row in settings)

    if kernels is not None:
        by_rank, by_mass = top_k_kernel if used("top_k") else None, top_p_kernel if used("top_p") else None
        fields["kernels"] = Kernels(by_rank, by_mass, joint=kernels == "joint")
    return SamplingFilters(
        temperature=column("temperature", 1.0),
        top_k=column("top_k", ALL, torch.int32),
        top_p=column("top_p", 1.0),
        min_p=column("min_p", 0.0),
        needed=used("top_k") or used("top_p") or used("min_p"),
        greedy=False,
        **fields,
    )


# --- by sorting -------------------------------------------------------------------------------------------------------

SETTINGS = (
    {},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 5, "temperature": 1.7},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.02},
)


def assert_the_oracles(got: Tensor, logits: Tensor, settings: tuple[dict, ...]) -> None:
    for row, chosen in enumerate(settings):
        probs = (logits[row].double() / chosen.get("temperature", 1.0)).softmax(-1)
        filters = {name: value for name, value in chosen.items() if name != "temperature"}
        expected = filter_probs(probs, **filters)
        assert got[row].sum() == pytest.approx(1.0, abs=1e-5)
        # A token just at the edge of the mass may be in for one precision and out for the other.
        off = (got[row] - expected).abs() > 1e-5 + 1e-3 * expected
        assert int((off & ((got[row] > 0) != (expected > 0))).sum()) <= 1
        assert int(off.sum()) <= max(1, logits.shape[-1] // 20)


@pytest.mark.parametrize("width", [40, 5000])
def test_sorted_is_the_oracles(width):
    """5000 is wide enough for the partial sort; the flat row, where that does not reach the mass, makes it sort all."""
    torch.manual_seed(1)
    logits = torch.randn(len(SETTINGS), width) * 3
    for scale in (1.0, 1e-3):
        assert_the_oracles(rows(*SETTINGS).probs(logits * scale), logits * scale, SETTINGS)


@pytest.mark.parametrize("largest", [1500, 6000])
def test_no_more_is_sorted_than_the_largest_top_k(largest):
    """Flat rows, which the ranks looked at first do not close."""
    settings = ({"top_k": 1500}, {"top_k": 40, "top_p": 0.9}, {"top_k": 1500, "min_p": 0.5}, {"top_k": 1})
    logits = torch.randn(len(settings), 5000, generator=torch.Generator().manual_seed(3)) * 0.1
    with Recorder(logits) as seen:
        got = rows(*settings, largest_top_k=largest).probs(logits)
    assert seen.names["aten.sort.default"] == (0 if largest < 5000 else 1) and seen.names["aten.topk.default"] >= 1
    assert_the_oracles(got, logits, settings)


def test_a_min_p_alone_needs_no_whole_sort():
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(3)) * 5
    with Recorder(logits) as seen:
        got = rows({"min_p": 0.1}, {"min_p": 1.0}).probs(logits)
    assert not seen.names["aten.sort.default"]
    assert_the_oracles(got, logits, ({"min_p": 0.1}, {"min_p": 1.0}))


def test_repeat_is_position_after_position():
    truncation = rows({"temperature": 2.0}, {"top_k": 3}, kernels="joint").repeat(3)
    assert truncation.temperature.tolist() == [2.0, 1.0] * 3 and truncation.top_k[1::2].tolist() == [3] * 3
    assert truncation.kernels is not None


# --- by kernels -------------------------------------------------------------------------------------------------------

WIDTH = 13
MARGIN = 1e-5  # around a mass, within which a token may be in or out


def left(probs: list[float], chosen: dict, joint: bool) -> set[int]:
    """The tokens that stay, one by one: as flashinfer's sampling kernel tests them (joint), or one limit on what the
    other left. A case where rounding decides is not considered."""
    top_k, top_p, min_p = chosen.get("top_k", ALL), chosen.get("top_p", 1.0), chosen.get("min_p", 0.0)
    ranked = {i for i, p in enumerate(probs) if p > 0 and sum(q > p for q in probs) < top_k}
    total = sum(probs if joint else (probs[i] for i in ranked))

    def above(i: int) -> float:
        return sum(q for q in probs if q > probs[i]) / total

    assume(top_p == 1.0 or all(abs(above(i) - top_p) > MARGIN for i in ranked))
    kept = {i for i in ranked if top_p == 1.0 or above(i) < top_p}
    return {i for i in kept if probs[i] >= min_p * max(probs)}


def expected(logits: Tensor, settings: list[dict], joint: bool) -> Tensor:
    """[R, V] by ``left``, one token where top-k is 1."""
    out = torch.zeros_like(logits)
    for row, chosen in enumerate(settings):
        probs = (logits[row] / chosen.get("temperature", 1.0)).softmax(-1)
        kept = left(probs.double().tolist(), chosen, joint)
        if chosen.get("top_k") == 1:
            kept = {int(logits[row].argmax())}
        index = torch.tensor(sorted(kept))
        out[row, index] = renormalised(probs[index])
    return out


# Few levels, so that many are equal; some masked; at times one with nearly all of the mass.
levels = st.one_of(st.integers(0, 6).map(lambda n: 0.7 * n), st.sampled_from([-torch.inf, 30.0]))
logit_rows = st.lists(levels, min_size=WIDTH, max_size=WIDTH).filter(lambda row: max(row) > -torch.inf)
limits = {
    "temperature": st.sampled_from([0.5, 1.3]),
    "top_k": st.sampled_from([1, 2, 3, 5, WIDTH - 1, WIDTH, ALL]),
    "top_p": st.sampled_from([1e-6, 0.137, 0.31, 0.5, 0.771, 0.95, 1.0]),
}
joint_settings = st.fixed_dictionaries({}, optional=limits)
settings_in_turn = st.fixed_dictionaries({}, optional=limits | {"min_p": st.sampled_from([0.0, 0.09, 0.3, 1.0])})


@given(st.lists(st.tuples(logit_rows, joint_settings), min_size=1, max_size=5))
def test_joint(cases):
    logits, settings = torch.tensor([row for row, _ in cases]), [chosen for _, chosen in cases]
    assert torch.allclose(rows(*settings, kernels="joint").probs(logits), expected(logits, settings, True), atol=1e-6)


@given(st.lists(st.tuples(logit_rows, settings_in_turn), min_size=1, max_size=5))
def test_in_turn(cases):
    logits, settings = torch.tensor([row for row, _ in cases]), [chosen for _, chosen in cases]
    settings[0].setdefault("min_p", 0.0)  # as SGLang: in turn is for batches with a min-p
    got = rows(*settings, kernels="in turn").probs(logits)
    assert torch.allclose(got, expected(logits, settings, False), atol=1e-6)


@given(st.permutations([0.31 * n for n in range(WIDTH)]), joint_settings)
def test_without_equals_joint_is_what_sorting_leaves(logits, chosen):
    logits = torch.tensor([logits])
    left(
        logits[0].div(chosen.get("temperature", 1.0)).softmax(-1).double().tolist(), chosen, True
    )  # no case for rounding
    assert torch.allclose(rows(chosen, kernels="joint").probs(logits), rows(chosen).probs(logits), atol=1e-6)


@given(logit_rows, joint_settings)
def test_with_equals_sorting_leaves_some_of_them(logits, chosen):
    """Never a token that a threshold would not leave, and never one fewer in order."""
    logits = torch.tensor([logits])
    by_threshold = expected(logits, [chosen], True)[0] > 0
    by_rank = rows(chosen).probs(logits)[0] > 0
    assert not bool((by_rank & ~by_threshold).any())
    assert not bool((logits[0][by_threshold & ~by_rank] > logits[0][by_rank].min()).any())


def test_joint_and_in_turn_are_not_the_same():
    """Top-k leaves 0.4 and 0.3; the first has 0.4 of all mass and 0.57 of theirs."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    chosen = {"top_k": 2, "top_p": 0.5}
    assert rows(chosen, kernels="joint").probs(logits)[0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert rows(chosen, kernels="in turn").probs(logits)[0].tolist() == pytest.approx([1, 0, 0, 0])
    assert rows(chosen).probs(logits)[0].tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])


@pytest.mark.parametrize("kernels", [None, "joint", "in turn"])
def test_of_equally_likely_tokens_a_greedy_row_has_the_first(kernels):
    """Also of tokens that only the softmax makes equal, and beside rows that are not greedy."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [0.0, 1e-9, 2e-9, 0.0], [0.0, 3.0, 1.0, 3.0]])
    got = rows({"top_k": 1}, {"top_k": 1, "top_p": 0.1}, {"top_k": 2}, kernels=kernels).probs(logits)
    assert torch.equal(got[:2], torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    assert got[2].tolist() == pytest.approx([0.0, 0.5, 0.0, 0.5])


# --- what it costs ----------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Names of the operators, and the most memory held by their results, in tensors like ``like``."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.names: Counter = Counter()
        self.peak, self._one, self._held = 0.0, like.nbytes, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        out = func(*args, **(kwargs or {}))
        self.hold(out)
        return out

    def hold(self, out) -> None:
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._held[id(tensor)] = tensor
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._held.values()}
        self.peak = max(self.peak, sum(storages.values()) / self._one)


def as_device(kernel, recorder: Recorder):
    """The kernel as one operator: only its result is seen."""

    def run(probs: Tensor, limit: Tensor) -> Tensor:
        assert probs.is_contiguous() and probs.dtype == torch.float32 and limit.shape == probs.shape[:1]
        with _disable_current_modes():
            out = kernel(probs, limit)
        recorder.names[kernel.__name__] += 1
        recorder.hold(out)
        return out

    return run


FORBIDDEN = ("sort", "topk", "cumsum", "_local_scalar_dense", "nonzero", "_to_copy", "index.", "index_put")


@pytest.mark.parametrize("joint,some_greedy", product([True, False], [True, False]))
def test_kernels_neither_sort_nor_wait_nor_pile_up(joint, some_greedy):
    """Two whole rows at once, and a mask, whatever is set; nothing that makes a host wait for its device."""
    last = {"top_k": 30, "top_p": 0.9, "min_p": 0.0 if joint else 0.1}
    settings = ({}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.4}, last)
    logits = torch.randn(len(settings), 211)
    recorder = Recorder(logits)
    truncation = rows(*settings, some_greedy=some_greedy)
    truncation.kernels = Kernels(as_device(top_k_kernel, recorder), as_device(top_p_kernel, recorder), joint=joint)
    with recorder:
        truncation.probs(logits)
    assert recorder.names["top_k_kernel"] == recorder.names["top_p_kernel"] == 1
    seen = [name for name in recorder.names if any(part in name for part in FORBIDDEN)]
    assert not seen, seen
    assert recorder.peak < 2.3


def test_only_what_a_row_needs_is_run():
    logits = torch.randn(2, 50)
    recorder = Recorder(logits)
    for settings, names in (({"top_k": 3}, {"top_k_kernel"}), ({"top_p": 0.5}, {"top_p_kernel"}), ({}, set())):
        recorder.names.clear()
        truncation = rows(settings, {}, kernels="joint")
        used = truncation.kernels
        truncation.kernels = Kernels(
            None if used.top_k is None else as_device(used.top_k, recorder),
            None if used.top_p is None else as_device(used.top_p, recorder),
            joint=True,
        )
        with recorder:
            truncation.probs(logits)
        assert {name for name in recorder.names if name.endswith("_kernel")} == names


def test_the_recorder_would_notice():
    """Sorting on this machine does what kernels must not."""
    logits = torch.randn(6, 2000)
    with Recorder(logits) as recorder:
        rows({"top_k": 3}, *[{"top_p": 0.9}] * 5).probs(logits)
    names = " ".join(recorder.names)
    assert all(part in names for part in ("sort", "topk", "cumsum", "_local_scalar_dense")) and recorder.peak > 4
