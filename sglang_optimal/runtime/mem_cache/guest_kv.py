"""The guest's KV cache: its slots, its rows and its radix cache, released at the same events as the host's.

The scheduler knows a mixed request once. The guest's ``req_to_token_pool`` has the host's size, so a request uses the
same row in both. At any time the guest holds ``len(G) − len(H)`` more tokens than the host (G, H: the two prompts), a
constant of the request, so its lengths are derived and never counted token by token.

Slots come in pages, as SGLang's do: the tokens of a row from one multiple of ``page_size`` to the next have one page's
slots, in order. A radix cache has whole pages alone; the last of a row, where it is not full, is the request's.
"""

from __future__ import annotations

import abc
from array import array
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocation import (
    alloc_paged_token_slots_decode,
    alloc_paged_token_slots_extend,
    alloc_token_slots,
)
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from sglang_optimal.runtime.core import GuestKVState, length_offset
from sglang_optimal.runtime.lora.student_adapter import StudentAdapter
from sglang_optimal.runtime.mem_cache.guest_states import GuestStates
from sglang_optimal.runtime.model_executor.host_copy import sent

MIN_ALIASED_PREFIX = 32
"""Tokens. A prefix that both contexts of one fresh request share is computed once if it is at least this long: the
guest's forward then has to follow the host's instead of being part of it."""


class GuestReq:
    """A request as the forward of its guest sees it, where that runs with a LoRA adapter."""

    def __init__(self, req: Req, lora_id: str):
        self._req = req
        self.lora_id = lora_id

    def __getattr__(self, name: str):
        return getattr(self._req, name)


class GuestKV(abc.ABC):
    """Slots, rows and radix cache of the guest; where they are is what the two kinds differ in.

    Attributes:
        one_pool: whether they are the host's, so that each side takes from what the other has.
        page_size: slots of a page, as the host's.
        req_pool_offset: what to add to a request's row number to find its guest's row in the model runner's table.
        states: of the guest's recurrent layers; None without any.
        holders: requests that hold slots, by id(); without any, all slots are free or in the tree.
        prompt_tokens, cached_tokens: of guest contexts so far, and how many of them the radix cache had.
    """

    one_pool: bool
    req_pool_offset = 0

    def __init__(self, req_to_token_pool, allocator, states: GuestStates | None):
        self.req_to_token_pool = req_to_token_pool
        self.allocator = allocator
        self.size = allocator.size
        self.page_size = allocator.page_size
        self.states = states
        self.active_reqs: dict[int, Req] = {}
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    @abc.abstractmethod
    def tree(self) -> BasePrefixCache:
        """The radix cache that has slots of the guest's pool."""

    @property
    def prefixes(self) -> BasePrefixCache:
        """The radix cache that has the guest's prefixes."""
        return self.tree

    @abc.abstractmethod
    def attach(self, host_tree: BasePrefixCache) -> None:
        """Take note of the host's radix cache, once it exists."""

    def as_guest(self, req: Req) -> Req:
        """The request as the guest's forward is to see it."""
        return req

    # -- accounting ------------------------------------------------------------------------------------------------

    @property
    def num_active_reqs(self) -> int:
        """Number of requests that hold slots."""
        return len(self.active_reqs)

    def available(self) -> int:
        """Tokens that can be allocated, evicting if needed."""
        return self.allocator.available_size() + self.tree.evictable_size()

    def stats(self) -> dict[str, int]:
        """Numbers of tokens: pool size, free, evictable and protected by the radix cache; requests holding slots;
        prompt tokens so far and how many of them the radix cache had."""
        return {
            "size": self.size,
            "free": self.allocator.available_size(),
            "evictable": self.tree.evictable_size(),
            "protected": self.tree.protected_size(),
            "requests": self.num_active_reqs,
            "prompt_tokens_total": self.prompt_tokens,
            "cached_prompt_tokens_total": self.cached_tokens,
        }

    def row_len(self, req: Req) -> int:
        """Length of the guest's row: prefix and slots of its own."""
        state = req.mixing.guest.kv
        # Not forwarded yet (waiting for the host's chunks): the row holds the prompt's slots and nothing else.
        return req.kv.kv_allocated_len + length_offset(req) if state.forwarded else len(state.ids)

    def floor_paged_tokens(self, tokens: int) -> int:
        """The whole pages among so many tokens."""
        return tokens // self.page_size * self.page_size

    def ceil_paged_tokens(self, tokens: int) -> int:
        """What so many tokens of one row take."""
        return -(-tokens // self.page_size) * self.page_size

    def private_tokens(self, req: Req) -> int:
        """Slots that belong to the request, and to no radix cache."""
        return self.ceil_paged_tokens(self.row_len(req)) - req.mixing.guest.kv.protected_len

    def new_tokens_required(self, req: Req, more: int) -> int:
        """Slots that must be free for ``more`` tokens of the request."""
        length = self.row_len(req)
        return self.ceil_paged_tokens(length + more) - self.ceil_paged_tokens(length)

    def has_state(self) -> bool:
        """Whether one more request finds a slot for the state of its recurrent layers, where there are any."""
        return self.states is None or self.states.available() > 0

    @abc.abstractmethod
    def can_decode(self, guest: int, host: int) -> bool:
        """Whether a step's ``guest`` tokens fit, evicting if needed. ``host``: what it takes there, which has been
        seen to fit."""

    @abc.abstractmethod
    def max_req_len(self, req: Req) -> int:
        """Longest guest context, new tokens included, that the pool can ever hold for this request."""

    # -- life of a request -----------------------------------------------------------------------------------------

    def match(self, req: Req) -> GuestKVState:
        """Match the request's guest context in the radix cache and lock what was found. Allocates nothing."""
        ids = req.mixing.guest.prompt_ids + req.output_ids
        score = req.mixing.score
        # The last token is always forwarded: its logits are needed, as are the hidden states before scored ones.
        key = self._key(req, ids[: len(ids) - 1 - (0 if score is None else score.length)])
        result = self.prefixes.match_prefix(MatchPrefixParams(key=key))
        node, prefix_len = result.last_device_node, result.device_prefix_len
        start = prefix_len + self._num_aliased(req, ids, prefix_len)
        return GuestKVState(ids=ids, prefix_len=prefix_len, start=start, node=node, lock=self.prefixes.lock(node))

    def _num_aliased(self, req: Req, ids: array, prefix_len: int) -> int:
        """How many tokens after the cached prefix the host computes for the guest: whole pages."""
        return 0

    def unmatch(self, state: GuestKVState) -> None:
        """Undo ``match`` for a request that was not admitted."""
        self.prefixes.unlock(state.lock)

    def allocate(self, req: Req, state: GuestKVState) -> None:
        """Take the slots for the whole guest prompt. The caller has checked that they fit."""
        state.slots = alloc_token_slots(self.tree, self.ceil_paged_tokens(state.extend_len))[: state.extend_len]
        state.protected_len = state.start
        state.recurrent = None if self.states is None else self.states.alloc(self.tree)
        state.aliases_host = state.start > state.prefix_len
        req.mixing.guest.kv = state
        self.active_reqs[id(req)] = req
        self.prompt_tokens += len(state.ids)
        self.cached_tokens += state.start

    def bind(self, req: Req) -> None:
        """Write the request's row, once the scheduler has given it one."""
        state = req.mixing.guest.kv
        if state.bound:
            return
        row = req.kv.req_pool_idx
        if self.states is not None:
            self.states.bind(row + self.req_pool_offset, state.recurrent)
        if state.prefix_len:
            prefix = self.prefixes.path_device_indices(state.node)[: state.prefix_len]
            self.req_to_token_pool.write((row, slice(0, state.prefix_len)), prefix.to(torch.int32))
        self.req_to_token_pool.write((row, slice(state.start, len(state.ids))), state.slots.to(torch.int32))
        state.bound = True

    @abc.abstractmethod
    def alias_host_prefix(self, req: Req) -> None:
        """Point the row at the host's slots, once the host's row is complete."""

    def decode_slots(
        self, rows: torch.Tensor, guest_lens: torch.Tensor, guest_lens_cpu: torch.Tensor | None
    ) -> torch.Tensor:
        """One slot a request for the token at position ``guest_lens − 1``; writes the rows.

        Args:
            rows: [n] int64 rows. guest_lens: [n] int64 lengths including the new token; guest_lens_cpu: the same on the
                CPU, which pages above one token need.

        Returns:
            [n] int64 slots.
        """
        if self.page_size == 1:
            slots = alloc_token_slots(self.tree, rows.numel())
        else:
            last = self.req_to_token_pool.req_to_token[rows, guest_lens - 2]
            slots = alloc_paged_token_slots_decode(self.tree, guest_lens, guest_lens_cpu, last)
        self.req_to_token_pool.write((rows, guest_lens - 1), slots.to(torch.int32))
        return slots

    def reserve(self, reqs: list[Req]) -> None:
        """Take as many slots ahead as the scheduler has just taken for the host, and write the rows."""
        growing: list[tuple[Req, int, int]] = []
        for req in reqs:
            state = req.mixing.guest.kv
            start, end = len(state.ids) + state.reserved, self.row_len(req)
            if end > start:
                growing.append((req, start, end))
                state.reserved += end - start
        if not growing:
            return
        rows = [req.kv.req_pool_idx for req, start, end in growing for _ in range(start, end)]
        positions = [i for _, start, end in growing for i in range(start, end)]
        device = self.req_to_token_pool.req_to_token.device
        slots = self._slots_ahead(growing, len(rows), device).to(torch.int32)
        where = sent(rows + positions, device)[1].view(2, -1)
        self.req_to_token_pool.write((where[0], where[1]), slots)

    def _slots_ahead(self, growing: list[tuple[Req, int, int]], total: int, device: torch.device) -> torch.Tensor:
        """[total] slots for positions [start, end) of rows, one row after another."""
        if self.page_size == 1:
            return alloc_token_slots(self.tree, total)
        reqs, starts, ends = zip(*growing, strict=True)
        numbers = [*(req.kv.req_pool_idx for req in reqs), *starts, *ends]
        cpu, there = (part.view(3, -1) for part in sent(numbers, device))
        last = self.req_to_token_pool.req_to_token[there[0], there[1] - 1]
        return alloc_paged_token_slots_extend(
            tree_cache=self.tree,
            prefix_lens=there[1],
            prefix_lens_cpu=cpu[1],
            seq_lens=there[2],
            seq_lens_cpu=cpu[2],
            last_loc=last,
            extend_num_tokens=total,
        )

    def checkpoint(self, req: Req) -> None:
        """After the prefill: put the prompt into the radix cache, so that others can share it at once."""
        state = req.mixing.guest.kv
        if state is None or not state.forwarded or state.failed or self.prefixes.disable:
            return
        if state.protected_len >= self.floor_paged_tokens(len(state.ids)):
            return
        if self._move_alias_to_tree(req, state):
            self._insert(req, state, len(state.ids))

    def _move_alias_to_tree(self, req: Req, state: GuestKVState) -> bool:
        """What was the host's is now the tree's: point the row there and lock it. False if the tree lacks it."""
        if not state.aliases_host:
            return True
        key = self._key(req, state.ids[: state.start])
        result = self.prefixes.match_prefix(MatchPrefixParams(key=key))
        if result.device_prefix_len < state.start:
            return False
        node = result.last_device_node
        moved = slice(state.prefix_len, state.start)
        slots = self.prefixes.path_device_indices(node)[moved].to(torch.int32)
        self.req_to_token_pool.write((req.kv.req_pool_idx, moved), slots)
        lock = self.prefixes.lock(node)
        self.prefixes.unlock(state.lock)
        state.node, state.lock, state.aliases_host = node, lock, False
        return True

    def release(self, req: Req, *, keep: bool) -> None:
        """Give everything back; with ``keep`` the computed tokens stay in the radix cache."""
        state = req.mixing.guest.kv
        if state is None:
            return
        total = self.row_len(req)
        req.mixing.guest.kv = None
        del self.active_reqs[id(req)]
        if self.states is not None:
            self.states.free(state.recurrent)
        if not state.bound:
            self.allocator.free_segment(state.slots, start_pos=state.start)
            self.prefixes.unlock(state.lock)
            return
        if keep and state.forwarded and not state.failed and not self.prefixes.disable:
            computed = self.floor_paged_tokens(min(req.owned_kv_len() + length_offset(req), total))
            if computed > state.protected_len and self._move_alias_to_tree(req, state):
                state.ids = (req.mixing.guest.prompt_ids + req.output_ids)[:computed]
                self._insert(req, state, computed)
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        if total > state.protected_len:
            self.allocator.free_segment(row[state.protected_len : total].to(torch.int64), start_pos=state.protected_len)
        self.prefixes.unlock(state.lock)

    @abc.abstractmethod
    def reset(self) -> None:
        """Drop everything; only when no request holds slots (``/flush_cache``)."""

    # -- radix tree ------------------------------------------------------------------------------------------------

    def _key(self, req: Req, ids: array) -> RadixKey:
        return RadixKey(ids, self._extra_key(req), cache_salt=req.cache_salt)

    def _extra_key(self, req: Req) -> str | None:
        """What beside the tokens the KV depends on."""
        return req.extra_key

    def _insert(self, req: Req, state: GuestKVState, length: int) -> None:
        """Insert the whole pages of the first ``length`` tokens; duplicates of what the tree has are freed and the row
        points to the tree's slots; the lock moves to the deeper node."""
        length = self.floor_paged_tokens(length)
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        key = self._key(req, state.ids[:length])
        values = row[:length].to(torch.int64, copy=True)
        node = self._insert_key(key, values, state.protected_len)
        slots = self.prefixes.path_device_indices(node)
        moved = slice(state.protected_len, length)
        self.req_to_token_pool.write((req.kv.req_pool_idx, moved), slots[moved].to(torch.int32))
        lock = self.prefixes.lock(node)
        self.prefixes.unlock(state.lock)
        state.node, state.lock, state.protected_len = node, lock, length

    @abc.abstractmethod
    def _insert_key(self, key: RadixKey, values: torch.Tensor, protected_len: int) -> Any:
        """Insert into the tree, free what it had already beyond ``protected_len``, and return the last node."""


class SeparateGuestKV(GuestKV):
    """The KV of a guest with weights of its own: a pool and a radix cache of its own.

    Args:
        req_to_token_pool, allocator: the guest model runner's.
        disable_radix_cache, eviction_policy: as the host's.
    """

    one_pool = False

    def __init__(self, req_to_token_pool, allocator, *, disable_radix_cache: bool, eviction_policy: str):
        super().__init__(req_to_token_pool, allocator, GuestStates.of(req_to_token_pool))
        self._tree = radix_cache(
            req_to_token_pool,
            allocator,
            disable=disable_radix_cache or self.states is not None,
            eviction_policy=eviction_policy,
        )

    @property
    def tree(self) -> BasePrefixCache:
        return self._tree

    def attach(self, host_tree: BasePrefixCache) -> None:
        """Not of interest."""

    def alias_host_prefix(self, req: Req) -> None:
        """Nothing is ever borrowed."""

    def can_decode(self, guest: int, host: int) -> bool:
        evict_from_tree_cache(self.tree, guest)
        return self.allocator.available_size() >= guest

    def max_req_len(self, req: Req) -> int:
        prompt = len(req.mixing.guest.prompt_ids)
        return prompt + self.size - self.page_size - self.ceil_paged_tokens(prompt)

    def reset(self) -> None:
        self.tree.reset()
        self.allocator.clear()
        if self.states is not None:
            self.states.reset()

    def _insert_key(self, key: RadixKey, values: torch.Tensor, protected_len: int) -> Any:
        params = InsertParams(key=key, value=values, inserted_len=protected_len, prev_prefix_len=protected_len)
        known = self.tree.insert(params).prefix_len
        if known > protected_len:
            self.allocator.free_segment(values[protected_len:known], start_pos=protected_len)
        return self.tree.match_prefix(MatchPrefixParams(key=key)).last_device_node


class SharedGuestKV(GuestKV):
    """The guest's KV where both sides have one model: slots from the host's pool, and the host's radix cache,
    so that a prefix which both contexts have is stored once.

    Args:
        rows: the guest's half of the table of rows, see `GuestReqToTokenPool`.
        allocator: the host's.
        adapter: the guest's; None: the guest is the host.
    """

    one_pool = True

    def __init__(self, rows: GuestReqToTokenPool, allocator, adapter: StudentAdapter | None = None):
        super().__init__(rows, allocator, GuestStates.of(rows.pool))
        self.adapter = adapter
        self.req_pool_offset = rows.offset
        self._host_rows = rows.host
        self._tree: BasePrefixCache | None = None
        self._no_prefixes = None if self.states is None else radix_cache(rows, allocator, disable=True)

    @property
    def tree(self) -> BasePrefixCache:
        """The host's.

        Raises:
            RuntimeError: it does not exist yet.
        """
        if self._tree is None:
            raise RuntimeError("the guest's KV is used before the host's radix cache exists")
        return self._tree

    @property
    def prefixes(self) -> BasePrefixCache:
        """The host's, unless there are states: it keeps those of the host's contexts alone."""
        return self.tree if self._no_prefixes is None else self._no_prefixes

    def attach(self, host_tree: BasePrefixCache) -> None:
        self._tree = host_tree

    def _num_aliased(self, req: Req, ids: array, prefix_len: int) -> int:
        # Of an adapter the same tokens have another KV; the hidden states of scored ones are the guest's own, as is
        # the state of recurrent layers, which all tokens go into.
        if self.adapter is not None or req.mixing.score is not None or self.states is not None:
            return 0
        host = req.origin_input_ids + req.output_ids
        longest = min(len(ids) - 1, len(host))
        common = longest
        if ids[:longest] != host[:longest]:
            common = next((i for i in range(longest) if ids[i] != host[i]), longest)
        aliased = self.floor_paged_tokens(common) - prefix_len
        return aliased if aliased >= MIN_ALIASED_PREFIX else 0

    def alias_host_prefix(self, req: Req) -> None:
        state = req.mixing.guest.kv
        if not state.aliases_host:
            return
        shared = slice(state.prefix_len, state.start)
        self.req_to_token_pool.write((req.kv.req_pool_idx, shared), self._host_rows[req.kv.req_pool_idx, shared])

    def as_guest(self, req: Req) -> Req:
        return req if self.adapter is None else GuestReq(req, self.adapter.lora_id)

    def _extra_key(self, req: Req) -> str | None:
        # As SGLang does for the requests of an adapter.
        return req.extra_key if self.adapter is None else (req.extra_key or "") + self.adapter.lora_id

    def has_state(self) -> bool:
        # So few requests run that each has one (`MixedKVCacheConfigurator`), though fewer may seem to be free: SGLang
        # sets slots aside while it admits.
        return True

    def can_decode(self, guest: int, host: int) -> bool:
        evict_from_tree_cache(self.tree, host + guest)
        return self.allocator.available_size() >= host + guest

    def max_req_len(self, req: Req) -> int:
        # H + G + 2 n tokens in one pool: the n that fits, as a length of the guest's context.
        host, guest = len(req.origin_input_ids), len(req.mixing.guest.prompt_ids)
        both = self.ceil_paged_tokens(host) + self.ceil_paged_tokens(guest)
        return guest + max((self.size - 2 * self.page_size - both) // 2, 0)

    def reset(self) -> None:
        """The host's own reset clears the pool and the tree."""

    def _insert_key(self, key: RadixKey, values: torch.Tensor, protected_len: int) -> Any:
        # This kind of tree frees duplicates itself.
        params = InsertParams(key=key, value=values, inserted_len=protected_len, prev_prefix_len=protected_len)
        return self.tree.insert(params).last_device_node


def radix_cache(rows, allocator, *, disable: bool, eviction_policy: str = "lru") -> RadixCache:
    """One for KV alone. Beside recurrent layers it is disabled: a prefix is of no use without their state after it,
    which it has no place for."""
    return RadixCache(
        CacheInitParams(
            disable=disable,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=allocator,
            page_size=allocator.page_size,
            eviction_policy=eviction_policy,
        )
    )


class GuestReqToTokenPool:
    """A second table of rows behind the host's, in the same tensor, so that one forward can read rows of both.

    Takes the place of the pool's table, of which several of SGLang's objects keep a reference (the translator of KV
    indices, attention backends): made before any of them is. The map from rows to the states of recurrent layers grows
    likewise.

    Attributes:
        pool: the host's.
        offset: what to add to a request's row number to find its guest's row.
        host, req_to_token: [rows, max context] views of the host's and the guest's half.
    """

    def __init__(self, req_to_token_pool):
        table = req_to_token_pool.req_to_token
        self.pool = req_to_token_pool
        self.offset = table.shape[0]
        self.size = req_to_token_pool.size
        # The pool itself goes on handing out rows of its own half only.
        req_to_token_pool.req_to_token = table.new_zeros((2 * self.offset, table.shape[1]))
        self.host = req_to_token_pool.req_to_token[: self.offset]
        self.req_to_token = req_to_token_pool.req_to_token[self.offset :]
        if isinstance(req_to_token_pool, HybridReqToTokenPool):
            slots = req_to_token_pool.req_index_to_mamba_index_mapping
            req_to_token_pool.req_index_to_mamba_index_mapping = slots.new_zeros(2 * self.offset)

    def write(self, indices, values: torch.Tensor) -> None:
        self.req_to_token[indices] = values
