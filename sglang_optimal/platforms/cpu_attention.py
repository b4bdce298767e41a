"""Attention on a CPU: all rows of a decode batch in one call, and the KV of a request that has several read once;
prompts of the same lengths in one call, of which what is cached is not computed again.

SGLang's ``torch_native`` backend calls PyTorch once for each row and layer, which on a small model costs more than the
arithmetic. A speculative step verifies several rows of one request.
"""

from __future__ import annotations

import dataclasses

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch.nn.functional import scaled_dot_product_attention

from sglang_optimal.platforms import cpu_kernels

# Up to here rows are better off alone, in a loop of our own; beyond, reading the KV of a request's rows once counts.
_LONGEST_ALONE = 1024
# A call of its own costs a request about as much as reading this many tokens does.
_TOKENS_PER_CALL = 256


@dataclasses.dataclass
class _Grouped:
    """The rows of one decode batch by request: G requests with at most r rows, of at most L tokens.

    Attributes:
        slots: [G, L] int64 KV slots. mask: [G, 1, r, L] bool, what each row sees.
        group, place: [B] int64, the request of each row and its position in it.
        rows: r.
    """

    slots: torch.Tensor
    mask: torch.Tensor
    group: torch.Tensor
    place: torch.Tensor
    rows: int
    _shared: torch.Tensor | None = None

    @classmethod
    def of(cls, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> _Grouped | None:
        """None where the lengths differ so much that rows are better off alone."""
        requests, group, counts = req_pool_indices.unique(return_inverse=True, return_counts=True)
        size, rows = len(requests), int(counts.max())
        order = group.argsort(stable=True)
        place = torch.empty_like(group)
        place[order] = torch.arange(len(group)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        # A place without a row sees one token, so that its softmax is one of something.
        lens = torch.ones((size, rows), dtype=torch.int64)
        lens[group, place] = seq_lens.to(torch.int64)
        longest = lens.amax(-1)
        width = int(longest.max())
        total = int(longest.sum())
        if size * width > 1.5 * total + _TOKENS_PER_CALL * size:
            return None  # padding to the longest would read too much that is not there
        slots = req_to_token[requests, :width].to(torch.int64)
        mask = torch.arange(width) < lens.unsqueeze(-1)
        return cls(slots, mask.unsqueeze(1), group, place, rows)

    def mask_of(self, share: int) -> torch.Tensor:
        """The mask with every row ``share`` times, [G, 1, r · share, L]."""
        if self._shared is None or self._shared.shape[2] != self.rows * share:
            self._shared = self.mask.repeat_interleave(share, dim=2)
        return self._shared


@dataclasses.dataclass
class _Prompts:
    """Requests of one prefill batch that have the same number of cached and of new tokens.

    Attributes:
        rows: [G, new] int64, their tokens in the batch. slots: [G, cached + new] int64.
        mask: [new, cached + new] bool; None where nothing is cached.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(cls, req_to_token: torch.Tensor, forward_batch: ForwardBatch) -> list[_Prompts]:
        """One for each pair of lengths."""
        requests = forward_batch.req_pool_indices.tolist()
        begins: dict[tuple[int, int], list[tuple[int, int]]] = {}
        begin = 0
        lens = zip(forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist(), strict=True)
        for request, (cached, new) in zip(requests, lens, strict=True):
            begins.setdefault((cached, new), []).append((request, begin))
            begin += new
        return [cls._of_one_size(req_to_token, *size, each) for size, each in begins.items()]

    @classmethod
    def _of_one_size(cls, req_to_token: torch.Tensor, cached: int, new: int, each: list[tuple[int, int]]) -> _Prompts:
        requests, begins = torch.tensor(each).unbind(-1)
        mask = torch.arange(cached + new) <= cached + torch.arange(new).unsqueeze(-1) if cached else None
        return cls(
            begins.unsqueeze(-1) + torch.arange(new), req_to_token[requests, : cached + new].to(torch.int64), mask
        )


def _is_windowed(kwargs: dict) -> bool:
    return kwargs.get("sliding_window_size") is not None or bool(kwargs.get("is_cross_attn"))


class GroupedRowsTorchNativeAttnBackend(TorchNativeAttnBackend):
    """``torch_native`` for a CPU; everything but plain causal layers is SGLang's own."""

    _grouped: _Grouped | None = None
    _prompts: tuple[_Prompts, ...] = ()
    _longest = 0
    _rows: tuple[torch.Tensor, torch.Tensor]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Group the rows of the batch by length, once for all layers."""
        super().init_forward_metadata(forward_batch)
        self._grouped, self._longest, self._prompts = None, 0, ()
        if forward_batch.forward_mode.is_extend() and forward_batch.extend_prefix_lens is not None:
            self._prompts = tuple(_Prompts.of(self.req_to_token_pool.req_to_token, forward_batch))
        if not forward_batch.forward_mode.is_decode() or not len(forward_batch.seq_lens):
            return
        longest = int(forward_batch.seq_lens.max())
        if longest <= _LONGEST_ALONE:
            self._longest = longest
            self._rows = forward_batch.req_pool_indices.to(torch.int64), forward_batch.seq_lens.to(torch.int64)
        else:
            self._grouped = _Grouped.of(
                self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens
            )

    def _run_sdpa_forward_decode(
        self, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """All rows of the batch in one call, where SGLang makes one for each."""
        if self._longest and not _is_windowed(kwargs) and cpu_kernels.is_plain(query, k_cache, v_cache):
            requests, lens = self._rows
            if len(requests) == len(query):
                cpu_kernels.decode_attention(
                    query, k_cache, v_cache, self.req_to_token_pool.req_to_token, requests, lens, self._longest,
                    kwargs.get("scaling") or query.shape[-1] ** -0.5, output,
                )  # fmt: skip
                return output
        grouped = self._grouped
        if grouped is None or _is_windowed(kwargs) or len(grouped.group) != len(query) or k_cache.dtype != query.dtype:
            return super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *args, **kwargs)
        # The heads that share one of the cache are rows of it as well, so that nothing has to be repeated.
        size, rows, heads = len(grouped.slots), grouped.rows, k_cache.shape[1]
        share = query.shape[1] // heads
        padded = query.new_zeros((size, rows, heads, share, query.shape[-1]))
        padded[grouped.group, grouped.place] = query.view(-1, heads, share, query.shape[-1])
        attended = scaled_dot_product_attention(
            padded.transpose(1, 2).reshape(size, heads, rows * share, -1),
            k_cache[grouped.slots].transpose(1, 2),
            v_cache[grouped.slots].transpose(1, 2),
            attn_mask=grouped.mask_of(share),
            scale=kwargs.get("scaling"),
        )
        attended = attended.view(size, heads, rows, share, -1).transpose(1, 2)
        output.copy_(attended[grouped.group, grouped.place].view(output.shape))
        return output

    def _run_sdpa_forward_extend(
        self, query: torch.Tensor, output: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        """Prompts of the same lengths in one call, and new tokens alone, where SGLang computes cached ones anew."""
        plain = kwargs.get("causal") and not _is_windowed(kwargs) and query.dtype == k_cache.dtype == v_cache.dtype
        if not plain or sum(prompts.rows.numel() for prompts in self._prompts) != len(query):
            return super()._run_sdpa_forward_extend(query, output, k_cache, v_cache, *args, **kwargs)
        for prompts in self._prompts:
            attended = scaled_dot_product_attention(
                query[prompts.rows].transpose(1, 2),
                k_cache[prompts.slots].transpose(1, 2),
                v_cache[prompts.slots].transpose(1, 2),
                attn_mask=prompts.mask,
                is_causal=prompts.mask is None,
                enable_gqa=query.shape[1] != k_cache.shape[1],
                scale=kwargs.get("scaling"),
            )
            output[prompts.rows] = attended.transpose(1, 2)
        return output
