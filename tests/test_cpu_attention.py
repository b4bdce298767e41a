"""The CPU's attention over grouped rows gives what SGLang's own loop gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_optimal.platforms import cpu_attention
from sglang_optimal.platforms.cpu_attention import GroupedRowsTorchNativeAttnBackend

HEADS, KV_HEADS, WIDTH, SLOTS = 6, 2, 16, 500


def backend(cls, table):
    made = object.__new__(cls)
    made.req_to_token_pool = SimpleNamespace(req_to_token=table)
    made.use_sliding_window_kv_pool = False
    return made


@pytest.mark.parametrize("longest_alone", [0, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "requests,lens",
    [
        ([3], [20]),
        ([3, 1, 4], [5, 9, 30]),
        ([3, 1, 4, 3, 1, 4], [5, 9, 30, 6, 10, 31]),  # two rows of each
        ([3, 1, 4, 1, 1], [5, 9, 30, 10, 11]),  # one of them has two more
        ([2, 5, 2], [1, 1, 2]),
        ([0, 1, 2, 3, 4], [990, 3, 2, 1, 2]),  # too different to be padded
    ],
)
def test_same_as_sglangs(requests, lens, dtype, longest_alone, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_LONGEST_ALONE", longest_alone)
    torch.manual_seed(0)
    table = torch.randint(0, SLOTS, (8, 1024), dtype=torch.int32)
    k, v = (torch.randn(SLOTS, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2))
    query = torch.randn(len(requests), HEADS, WIDTH, dtype=dtype)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=torch.tensor(requests),
        seq_lens=torch.tensor(lens),
        out_cache_loc=None,
    )
    outputs = []
    for cls in (TorchNativeAttnBackend, GroupedRowsTorchNativeAttnBackend):
        made = backend(cls, table)
        made.init_forward_metadata(batch)
        if cls is GroupedRowsTorchNativeAttnBackend:
            assert (made._grouped is None) == (max(lens) == 990 or longest_alone > 0)
            assert made._longest == (max(lens) if longest_alone else 0)
        output = torch.empty_like(query)
        arguments = (query, output, k, v, table, batch.req_pool_indices, batch.seq_lens, None)
        made._run_sdpa_forward_decode(*arguments, scaling=0.3, enable_gqa=True, causal=False)
        outputs.append(output.float())
    assert torch.allclose(*outputs, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "requests,cached,new",
    [
        ([3], [0], [20]),
        ([3, 1, 4], [0, 0, 0], [7, 7, 7]),
        ([3, 1, 4, 6], [0, 5, 30, 5], [9, 4, 1, 4]),  # two with the same lengths, not side by side
        ([2, 5], [1, 0], [1, 1]),
    ],
)
def test_prefill_same_as_sglangs(requests, cached, new, dtype, monkeypatch):
    torch.manual_seed(0)
    table = torch.randint(0, SLOTS, (8, 64), dtype=torch.int32)
    k, v = (torch.randn(SLOTS, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2))
    query = torch.randn(sum(new), HEADS, WIDTH, dtype=dtype)
    cached, new = torch.tensor(cached), torch.tensor(new)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        req_pool_indices=torch.tensor(requests),
        seq_lens=cached + new,
        extend_prefix_lens=cached,
        extend_seq_lens=new,
        out_cache_loc=None,
    )
    outputs = []
    for cls in (TorchNativeAttnBackend, GroupedRowsTorchNativeAttnBackend):
        made = backend(cls, table)
        made.init_forward_metadata(batch)
        output = torch.empty_like(query)
        arguments = (query, output, k, v, table, batch.req_pool_indices, batch.seq_lens, cached, new)
        made._run_sdpa_forward_extend(*arguments, None, scaling=0.3, enable_gqa=True, causal=True)
        outputs.append(output.float())
        monkeypatch.setattr(TorchNativeAttnBackend, "_run_sdpa_forward_extend", None)
    assert torch.allclose(*outputs, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_prefill_that_is_sglangs(monkeypatch):
    """Windows, and a batch of other rows than the metadata's, go to SGLang's own loop."""
    monkeypatch.setattr(TorchNativeAttnBackend, "_run_sdpa_forward_extend", lambda *args, **kwargs: "sglang's")
    made = backend(GroupedRowsTorchNativeAttnBackend, torch.zeros(8, 64, dtype=torch.int32))
    lens = torch.tensor([4])
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, req_pool_indices=torch.tensor([1]), seq_lens=lens, out_cache_loc=None,
        extend_prefix_lens=torch.tensor([0]), extend_seq_lens=lens,
    )  # fmt: skip
    made.init_forward_metadata(batch)
    k = torch.randn(9, KV_HEADS, WIDTH)
    for rows, more in ((5, {}), (4, {"sliding_window_size": 2}), (4, {"causal": False}), (4, {"is_cross_attn": True})):
        query = torch.randn(rows, HEADS, WIDTH)
        assert made._run_sdpa_forward_extend(query, query, k, k, **{"causal": True, **more}) == "sglang's"
