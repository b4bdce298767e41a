"""What a speculative step leaves of a distribution is what SGLang's sampler leaves of it in lockstep.

SGLang's own code says what that is: where a request asks for its sampling mask, the sampler returns the weights that it
draws from. flashinfer's kernels need a GPU; elsewhere plain PyTorch stands in for them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from sglang.srt.layers import sampler
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from torch import Tensor

from sglang_optimal.runtime.core import MixedRows
from sglang_optimal.runtime.sampling import filters as truncation
from sglang_optimal.runtime.sampling.filters import filters_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="flashinfer's kernels run on a GPU")


def top_k_by_threshold(probs: Tensor, top_k: Tensor) -> Tensor:
    """All that are at least as likely as the k-th, as flashinfer."""
    last = (top_k.long() - 1).clamp(max=probs.shape[-1] - 1).unsqueeze(-1)
    kept = torch.where(probs >= probs.sort(-1, descending=True).values.gather(-1, last), probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_by_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """All that are at least as likely as the one that makes the mass p, as flashinfer."""
    values = probs.double().sort(-1, descending=True).values
    inside = values.cumsum(-1) - values < top_p.double().unsqueeze(-1) * values.sum(-1, keepdim=True)
    edge = values.masked_fill(~inside & (top_p < 1).unsqueeze(-1), torch.inf).amin(-1, keepdim=True)
    kept = torch.where(probs >= edge, probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def most_likely(probs: Tensor, *limits, filter_apply_order: str = "joint") -> Tensor:
    """In place of a draw, which the mask does not depend on."""
    assert filter_apply_order == "joint"
    return probs.argmax(-1).int()


@pytest.fixture(params=["pytorch", "stand-ins", pytest.param("flashinfer", marks=needs_gpu)])
def backend(request, monkeypatch) -> SimpleNamespace:
    """SGLang's backend of that name, on the device that it runs on."""
    name = "pytorch" if request.param == "pytorch" else "flashinfer"
    for module in (sampler, truncation):
        monkeypatch.setattr(module, "get_exec", lambda: SimpleNamespace(kernel=SimpleNamespace(sampling_backend=name)))
    if request.param == "stand-ins":
        monkeypatch.setattr(sampler, "top_k_renorm_prob", top_k_by_threshold, raising=False)
        monkeypatch.setattr(sampler, "top_p_renorm_prob", top_p_by_threshold, raising=False)
        monkeypatch.setattr(sampler, "min_p_sampling_from_probs", most_likely, raising=False)
        monkeypatch.setattr(sampler, "top_k_top_p_sampling_from_probs", most_likely, raising=False)
    return SimpleNamespace(name=name, device="cuda" if request.param == "flashinfer" else "cpu")


def info_of(settings: list[dict], device: str = "cpu") -> SamplingBatchInfo:
    """A batch of one request for each settings, all of which want their mask; as ``from_schedule_batch``."""

    def column(name: str, default: float, dtype=torch.float32) -> Tensor:
        return torch.tensor([row.get(name, default) for row in settings], dtype=dtype, device=device)

    top_k = [row.get("top_k", TOP_K_ALL) for row in settings]
    return SamplingBatchInfo(
        temperatures=column("temperature", 1.0).view(-1, 1),
        top_ps=column("top_p", 1.0),
        top_ks=column("top_k", TOP_K_ALL, torch.int32),
        min_ps=column("min_p", 0.0),
        is_all_greedy=all(k == 1 for k in top_k),
        is_any_greedy=any(k == 1 for k in top_k),
        need_top_p_sampling=any(row.get("top_p", 1.0) != 1.0 for row in settings),
        need_top_k_sampling=any(k != TOP_K_ALL for k in top_k),
        need_min_p_sampling=any(row.get("min_p", 0.0) > 0 for row in settings),
        max_top_k=max(top_k) if max(top_k) < TOP_K_ALL else None,
        vocab_size=0,
        sampling_mask_batch_indices=torch.arange(len(settings), device=device),
    )


def mixed(index: Tensor | None = None) -> MixedRows:
    """Rows of a batch; None: all. Nothing but how they are selected."""
    rows = object.__new__(MixedRows)
    rows.device_row_ids = index
    return rows


def lockstep(logits: Tensor, info: SamplingBatchInfo) -> Tensor:
    """[B, V] what SGLang draws from, normalised."""
    probs = (logits / info.temperatures).softmax(-1)
    simple = not (info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling)
    _, capture = sampler.Sampler._sample_from_probs(None, probs.clone(), info, None, simple)
    weights = capture.weights
    if capture.token_ids is not None:
        weights = torch.zeros_like(probs).scatter_(-1, capture.token_ids.long(), weights)
    return weights / weights.sum(-1, keepdim=True)


BATCHES = {
    "nothing": [{}, {"temperature": 0.5}],
    "top-k": [{"top_k": 5, "temperature": 1.7}, {}, {"top_k": 40}, {"top_k": 5000}],
    "only bounded top-k": [{"top_k": 5, "temperature": 1.7}, {"top_k": 40}, {"top_k": 2}],
    "top-p": [{"top_p": 0.6}, {"top_p": 1e-6}, {}, {"top_p": 0.95}],
    "joint": [{"top_k": 20, "top_p": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {}, {"top_k": 2, "top_p": 0.3}],
    "greedy among others": [{"top_k": 1}, {"top_k": 20, "top_p": 0.6}, {"top_k": 1, "top_p": 0.3}, {}],
    "min-p": [{"min_p": 0.2}, {"min_p": 1.0}, {}],
    "in turn": [{"top_k": 20, "top_p": 0.6, "min_p": 0.1}, {"top_k": 20, "top_p": 0.6}, {"top_p": 0.8, "min_p": 0.05}],
    "greedy in turn": [{"top_k": 1}, {"top_k": 20, "top_p": 0.6, "min_p": 0.1}, {}],
}


def logits_of(rows: int, width: int, backend: SimpleNamespace) -> Tensor:
    """Normal; with equals where equals are to be treated alike, and some masked."""
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 2
    if backend.name == "flashinfer":
        logits = (logits * 4).round() / 4
    logits[:, ::7] = -torch.inf
    return logits.to(backend.device)


@pytest.mark.parametrize("width", [30, 301, 5001])
@pytest.mark.parametrize("name", BATCHES)
def test_as_in_lockstep(backend, name, width):
    settings = BATCHES[name]
    info, logits = info_of(settings, backend.device), logits_of(len(settings), width, backend)
    got, expected = filters_of(info, mixed()).probs(logits), lockstep(logits, info)
    assert got.sum(-1).tolist() == pytest.approx([1.0] * len(settings), abs=1e-5)
    for row, chosen in enumerate(settings):
        if chosen.get("top_k") == 1:  # lockstep draws one of equals, or takes the first where all rows are greedy
            best = int(logits[row].argmax())
            assert got[row, best] == 1 and got[row].count_nonzero() == 1 and expected[row, best] > 0
        else:
            assert torch.allclose(got[row], expected[row], atol=1e-6), chosen
            # flashinfer adds masses up in any order, which may decide about what is too little to be seen above.
            assert backend.device == "cuda" or torch.equal(got[row] > 0, expected[row] > 0), chosen


def test_another_requests_min_p_counts(backend):
    """It changes what SGLang does with the whole batch, whether or not that request is drafted for."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], device=backend.device).log().repeat(2, 1)
    first, both = mixed(torch.tensor([0], device=backend.device)), {"top_k": 2, "top_p": 0.5}
    for other, last in (({}, 3 / 7), ({"min_p": 0.01}, 0.0 if backend.name == "flashinfer" else 3 / 7)):
        info = info_of([both, other], backend.device)
        got = filters_of(info, first).probs(logits[:1])
        assert got[0].tolist() == pytest.approx([1 - last, last, 0, 0])
        assert torch.allclose(got[0], lockstep(logits, info)[0], atol=1e-6)


def test_rows_are_those_that_were_asked_for(backend):
    settings = BATCHES["joint"]
    info, index = info_of(settings, backend.device), torch.tensor([4, 0], device=backend.device)
    logits = logits_of(len(settings), 301, backend)
    got = filters_of(info, mixed(index)).repeat(2).probs(logits[index].repeat(2, 1))
    assert torch.allclose(got, lockstep(logits, info)[index].repeat(2, 1), atol=1e-6)


def test_what_runs(backend):
    """Kernels where SGLang has them, and only for limits that some row has."""
    kernels = filters_of(info_of([{"top_k": 5}, {}]), mixed()).kernels
    if backend.name == "pytorch":
        assert kernels is None
    else:
        assert kernels.top_k is sampler.top_k_renorm_prob and kernels.top_p is None and kernels.joint
        kernels = filters_of(info_of([{"top_p": 0.5, "min_p": 0.1}, {}]), mixed()).kernels
        assert kernels.top_p is sampler.top_p_renorm_prob and kernels.top_k is None and not kernels.joint


def test_no_row_is_greedy_or_all_are(backend):
    for settings, every, some in (([{}, {"top_k": 2}], 0, 0), ([{}, {"top_k": 1}], 0, 1), ([{"top_k": 1}] * 2, 1, 1)):
        found = filters_of(info_of(settings), mixed())
        assert (found.greedy, found.some_greedy) == (every, some)


@needs_gpu
@pytest.mark.parametrize("backend", ["flashinfer"], indirect=True)
@pytest.mark.parametrize("name", ["joint", "in turn"])
def test_flashinfers_draws(backend, name):
    """The kernels that draw in lockstep leave the same as those that drafting has."""
    draws, width = 50_000, 3001
    for chosen in BATCHES[name]:
        info, logits = info_of([chosen, *BATCHES[name]], "cuda"), logits_of(1, width, backend)
        expected = filters_of(info, mixed(torch.tensor([0], device="cuda"))).probs(logits)[0].double().cpu() * draws
        probs = (logits / info.temperatures[0]).softmax(-1).repeat(draws, 1)
        top_k, top_p, min_p = (limit[:1].repeat(draws) for limit in (info.top_ks, info.top_ps, info.min_ps))
        if info.need_min_p_sampling:
            probs = sampler.top_p_renorm_prob(sampler.top_k_renorm_prob(probs, top_k), top_p)
            drawn = sampler.min_p_sampling_from_probs(probs, min_p)
        else:
            drawn = sampler.top_k_top_p_sampling_from_probs(probs, top_k, top_p, filter_apply_order="joint")
        counts = torch.bincount(drawn.cpu().long(), minlength=width).double()
        assert not bool(counts[expected == 0].any())
        common = expected >= 8
        # The rare ones together, and eight more on both sides, which may be none.
        counts = torch.cat([counts[common], counts[~common].sum().view(1) + 8])
        expected = torch.cat([expected[common], expected[~common].sum().view(1) + 8])
        assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-5


@needs_gpu
@pytest.mark.parametrize("backend", ["flashinfer"], indirect=True)
@pytest.mark.parametrize("name", BATCHES)
def test_the_host_does_not_wait(backend, name):
    settings = BATCHES[name]
    found, logits = filters_of(info_of(settings, "cuda"), mixed()), logits_of(len(settings), 5001, backend)
    found.probs(logits)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.probs(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
