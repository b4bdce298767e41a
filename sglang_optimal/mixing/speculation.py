"""Speculative sampling with the mixture as target: the student proposes, the mixture decides, and nothing is lost.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (ICML 2023), and Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (2023): a proposal y drawn from p is kept with
probability min(1, q(y)/p(y)), and otherwise replaced by a draw from (q − p)₊, normalised. What comes out follows q.
Here q is the mixture, which needs the student's logits at every position anyway, and p is made of those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 256


def draw(weights: Tensor) -> Tensor:
    """One column of each row, in proportion to its weight; weights [R, V] ≥ 0, not all 0. Returns [R] int64."""
    if weights.device.type == "cpu":
        return _invert(weights)
    # The exponential race: as many random numbers as columns, but torch.multinomial would wait for the device as well,
    # to check what it was given.
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def _invert(weights: Tensor) -> Tensor:
    """`draw` by inverting the distribution function, first over blocks of columns and then within one."""
    missing = -weights.shape[-1] % _BLOCK
    blocks = (pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1).double().cumsum(-1)
    mark = torch.rand((len(weights), 1), dtype=torch.float64) * sums[:, -1:]
    block = _first_above(sums, mark)
    mark -= torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(weights)), block.squeeze(-1)].double().cumsum(-1)
    return (block * _BLOCK + _first_above(inside, mark)).squeeze(-1)


def _first_above(sums: Tensor, mark: Tensor) -> Tensor:
    """[R, 1] the first column of the running ``sums`` [R, n] above ``mark`` [R, 1], or the last that adds to them."""
    last = (sums >= sums[:, -1:]).to(torch.int8).argmax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(sums, mark, right=True), last)


def verify(target: Tensor, proposal: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the longest run of drafts that the target accepts, and add one token of the target's.

    Args:
        target: [k+1, n, V], q at each position; the last is the one after all drafts.
        proposal: [k, n, V], p that each draft was drawn from.
        drafts: [k, n] int64.

    Returns:
        (tokens [k+1, n] int64, accepted [n] int64): the first ``accepted`` tokens are drafts, the next is drawn from
        (q − p)₊ there, or from q after k drafts; those behind it mean nothing.
    """
    k, n = drafts.shape
    index = drafts.unsqueeze(-1)
    q, p = target[:k].gather(-1, index).squeeze(-1), proposal.gather(-1, index).squeeze(-1)
    kept = torch.rand(k, n, device=q.device) * p < q
    accepted = kept.long().cumprod(0).sum(0)
    column = torch.arange(n, device=q.device)
    weights = target[accepted, column]
    rejected = (accepted < k).unsqueeze(-1)
    residual = (weights - proposal[accepted.clamp(max=k - 1), column]).clamp_(min=0.0)
    # Rejected although q and p agree to the last bit of every token: only rounding does that, and q is then right.
    rejected = rejected & (residual.sum(-1, keepdim=True) > 0)
    last = draw(torch.where(rejected, residual, weights))
    tokens = torch.cat([drafts, drafts.new_zeros((1, n))])
    tokens[accepted, column] = last
    return tokens, accepted


def verify_greedy(best: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` where only the most likely token counts: ``best`` [k+1, n], the target's. Returns the same."""
    return best, (best[: len(drafts)] == drafts).long().cumprod(0).sum(0)
