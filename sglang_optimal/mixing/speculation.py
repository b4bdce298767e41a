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
    """One column of each row, in proportion to its weight.

    Args:
        weights: [R, V] float32 on CPU or CUDA, ≥ 0 and not all 0 in any row.

    Returns:
        [R] int64.

    Example:
        >>> draw(torch.tensor([[0.0, 2.0, 0.0], [0.5, 0.0, 0.0]]))
        tensor([1, 0])
    """
    if weights.device.type == "cpu":
        # [8, 49152] on one thread of an Intel Xeon: 0.2 ms, where torch.multinomial takes 29 and the race below 32.
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


def verify(target_probs: Tensor, draft_probs: Tensor, draft_token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the longest run of drafts that the target accepts, and add one token of the target's (the bonus token).

    Args:
        target_probs: [k+1, n, V] float32, q at each position; the last is the one after all drafts.
        draft_probs: [k, n, V] float32, p that each draft was drawn from.
        draft_token_ids: [k, n] int64. All on one device, CPU or CUDA.

    Returns:
        (token_ids [k+1, n] int64, num_accepted [n] int64): the first ``num_accepted`` tokens are drafts, the next is
        drawn from (q − p)₊ there, or from q after k drafts; those behind it mean nothing.

    Source:
        Algorithm 1 of Leviathan et al. 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318).

    Example:
        >>> target = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])  # one row, one draft, two tokens
        >>> verify(target, draft_probs=torch.tensor([[[0.5, 0.5]]]), draft_token_ids=torch.tensor([[1]]))
        (tensor([[1],
                [0]]), tensor([1]))
        >>> verify(target, draft_probs=torch.tensor([[[0.5, 0.5]]]), draft_token_ids=torch.tensor([[0]]))[0][0]
        tensor([1])
    """
    k, n = draft_token_ids.shape
    index = draft_token_ids.unsqueeze(-1)
    q, p = target_probs[:k].gather(-1, index).squeeze(-1), draft_probs.gather(-1, index).squeeze(-1)
    kept = torch.rand(k, n, device=q.device) * p < q
    num_accepted = kept.long().cumprod(0).sum(0)
    column = torch.arange(n, device=q.device)
    weights = target_probs[num_accepted, column]
    rejected = (num_accepted < k).unsqueeze(-1)
    residual = (weights - draft_probs[num_accepted.clamp(max=k - 1), column]).clamp_(min=0.0)
    # Rejected although q and p agree to the last bit of every token: only rounding does that, and q is then right.
    rejected = rejected & (residual.sum(-1, keepdim=True) > 0)
    bonus = draw(torch.where(rejected, residual, weights))
    token_ids = torch.cat([draft_token_ids, draft_token_ids.new_zeros((1, n))])
    token_ids[num_accepted, column] = bonus
    return token_ids, num_accepted


def verify_greedy(target_token_ids: Tensor, draft_token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` where only the most likely token counts.

    Args:
        target_token_ids: [k+1, n] int64, the target's most likely tokens. draft_token_ids: [k, n] int64.

    Returns:
        (token_ids, num_accepted), as `verify`.

    Example:
        >>> verify_greedy(torch.tensor([[5], [6], [7]]), torch.tensor([[5], [9]]))[1]
        tensor([1])
    """
    accepted = target_token_ids[: len(draft_token_ids)] == draft_token_ids
    return target_token_ids, accepted.long().cumprod(0).sum(0)
