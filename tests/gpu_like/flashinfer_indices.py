"""FlashInfer's KV indices, built by SGLang's own code for each decode step beside those of its triton backend.

Its kernels need a GPU; what they would read does not.
"""

from __future__ import annotations

import types

import torch

plans = {"right": 0, "wrong": 0}


def install() -> None:
    """In a scheduler process whose attention backend is triton, in the interpreter."""
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferIndicesUpdaterDecode
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    plan = TritonAttnBackend.init_forward_metadata_out_graph

    def planned(self, forward_batch, in_capture: bool = False) -> None:
        plan(self, forward_batch, in_capture=in_capture)
        if not in_capture and forward_batch.forward_mode.is_decode():
            plans["right" if _is_right(FlashInferIndicesUpdaterDecode, self, forward_batch) else "wrong"] += 1

    TritonAttnBackend.init_forward_metadata_out_graph = planned


def _is_right(updater: type, backend, forward_batch) -> bool:
    """Whether the indices are those of the rows' own tokens, in the table that is written to."""
    size = forward_batch.batch_size
    rows, lens = forward_batch.req_pool_indices[:size], forward_batch.seq_lens[:size]
    total = int(lens.sum())
    wrapper = types.SimpleNamespace(
        is_cuda_graph_enabled=True,
        _paged_kv_indices_buf=torch.full((total,), -1, dtype=torch.int32),
        begin_forward=lambda *args, **kwargs: None,
    )
    own = types.SimpleNamespace(
        attn_backend=backend, kv_last_page_len=torch.ones(size, dtype=torch.int32), _swa_kv_pool=None,
        num_qo_heads=1, num_kv_heads=1, head_dim=1, data_type=None, q_data_type=None,
    )  # fmt: skip
    indptr = torch.zeros(size + 1, dtype=torch.int32)
    updater.call_begin_forward(
        own, wrapper, lens, total, indptr, None, None, forward_batch.seq_lens_cpu,
        plan=forward_batch.kv_loc_plan, req_pool_indices=rows,
    )  # fmt: skip
    table = backend.req_to_token_pool.req_to_token
    expected = torch.cat([table[row, :length] for row, length in zip(rows.tolist(), lens.tolist(), strict=True)])
    return torch.equal(wrapper._paged_kv_indices_buf, expected.to(torch.int32))
