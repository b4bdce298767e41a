"""Drawing a token on a CPU with one random number, where PyTorch draws one for each of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def draw(probs: Tensor) -> Tensor:
    """One index a row, by inversion of the cumulative sums.

    Args:
        probs: [B, V], at least 0; they need not sum to 1.

    Returns:
        [B] int32; never an index whose probability is 0.
    """
    sums = probs.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    # Below the total, so that rounding cannot lead beyond the last index that has a probability.
    at = torch.minimum(
        torch.rand(total.shape, dtype=torch.float64) * total, torch.nextafter(total, torch.zeros_like(total))
    )
    drawn = torch.searchsorted(sums, at, right=True)
    return drawn.view(-1).clamp_(max=probs.shape[-1] - 1).to(torch.int32)  # NaN leads beyond


def drawing_one_number(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In place of SGLang's ``sampling_from_probs_torch``, which stays for requests with seeds."""

    @wraps(original)
    def sampling_from_probs(
        probs: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        if sampling_seed is not None:
            return original(probs, sampling_seed, positions)
        return draw(probs)

    return sampling_from_probs
