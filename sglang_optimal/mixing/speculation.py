"""Speculative sampling: a draft model proposes tokens, a target distribution accepts or replaces them.

A token y drawn from p is accepted with probability min(1, q(y)/p(y)), and otherwise replaced by a draw from (q − p)₊,
normalised. The result is distributed as q for every p. The probability of acceptance is the overlap Σ min(p, q), which
is 1 minus the total variation distance of p and q.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192); Chen et
al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling" (arXiv 2302.01318).

In the engine q is the mixture, which needs the student's logits at every position anyway, and p is made of those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 256


def draw(weights: Tensor) -> Tensor:
    """Draw one column of each row, in proportion to its weight.

    Uses the device's default random generator, and on a GPU does not wait for the device.

    Args:
        weights: [R, V], any float dtype, cpu or cuda; at least 0, finite, and with a positive sum in each row. This is
            not checked.

    Returns:
        [R] int64, on the device of ``weights``.

    Example:
        >>> import torch
        >>> from sglang_optimal.mixing import draw
        >>> draw(torch.tensor([[0.0, 2.0, 0.0], [0.5, 0.0, 0.0]]))
        tensor([1, 0])
    """
    if weights.device.type == "cpu":
        return _invert(weights)
    # The exponential race takes as many random numbers as columns, but torch.multinomial would wait for the device, to
    # check its argument.
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def _invert(weights: Tensor) -> Tensor:
    """`draw` by inverting the distribution function, first over blocks of columns and then within one.

    Takes one random number a row. [8, 49152] float32 on one core of an Intel Xeon (virtual, AVX-512): 0.2 to 0.3 ms,
    beside 10 to 16 ms of ``torch.multinomial`` and 12 to 17 ms of the exponential race.
    """
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
    """Accept the longest prefix of the drafts, and add one token drawn from the target (the bonus token).

    With q = ``target_probs`` and p = ``draft_probs``, the emitted tokens of each row are distributed as q (Leviathan et
    al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2). Uses the device's default random generator, and on a GPU does
    not wait for the device.

    Args:
        target_probs: [k+1, n, V] float32, q at each position; the last is the position after all drafts.
        draft_probs: [k, n, V] float32, the p that each draft was drawn from; k ≥ 1. On the device of ``target_probs``
            (cpu or cuda), as all arguments.
        draft_token_ids: [k, n] int64.

    Returns:
        (token_ids [k+1, n] int64, num_accepted [n] int64). Of row i the first ``num_accepted[i]`` tokens are drafts,
        and the next one is drawn from (q − p)₊ at that position, or from q where all k drafts were accepted. Entries
        after that one are meaningless.

    Raises:
        ValueError: the shapes do not fit one another.

    Example:
        >>> import torch
        >>> from sglang_optimal.mixing import draw, verify
        >>> _ = torch.manual_seed(0)
        >>> draft_probs = torch.tensor([[[0.6, 0.4, 0.0]], [[0.5, 0.5, 0.0]]])  # k = 2 positions, n = 1 row, V = 3
        >>> draft_token_ids = torch.stack([draw(probs) for probs in draft_probs])
        >>> target_probs = torch.cat([draft_probs[:1], torch.tensor([[[0.0, 0.0, 1.0]], [[0.2, 0.3, 0.5]]])])
        >>> token_ids, num_accepted = verify(target_probs, draft_probs, draft_token_ids)
        >>> num_accepted.tolist()  # the first position agrees; at the second the target has nothing but token 2
        [1]
        >>> token_ids[1].tolist()
        [2]
    """
    k, n = draft_token_ids.shape
    if k == 0 or draft_probs.shape[:2] != (k, n) or target_probs.shape != (k + 1, n, draft_probs.shape[-1]):
        raise ValueError(
            "target_probs, draft_probs, draft_token_ids: must be [k+1, n, V], [k, n, V] and [k, n] with k ≥ 1, got "
            f"{list(target_probs.shape)}, {list(draft_probs.shape)} and {[k, n]}."
        )
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
    """Accept the longest prefix of the drafts that are the target's most likely tokens.

    Args:
        target_token_ids: [k+1, n] int64, the most likely token of the target at each position.
        draft_token_ids: [k, n] int64, on the same device (cpu or cuda).

    Returns:
        (token_ids [k+1, n] int64, num_accepted [n] int64) as `verify`; the tokens are ``target_token_ids``.

    Raises:
        ValueError: the shapes do not fit one another.

    Example:
        >>> import torch
        >>> from sglang_optimal.mixing import verify_greedy
        >>> token_ids, num_accepted = verify_greedy(torch.tensor([[5], [6], [7]]), torch.tensor([[5], [9]]))
        >>> num_accepted
        tensor([1])
    """
    k, n = draft_token_ids.shape
    if target_token_ids.shape != (k + 1, n):
        raise ValueError(
            "target_token_ids, draft_token_ids: must be [k+1, n] and [k, n], got "
            f"{list(target_token_ids.shape)} and {[k, n]}."
        )
    return target_token_ids, (target_token_ids[:k] == draft_token_ids).long().cumprod(0).sum(0)
