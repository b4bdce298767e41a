"""Checks of arguments that several losses have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; every other float is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: must be one of {', '.join(allowed)}, got {value!r}.")


def check_shape(name: str, tensor: Tensor, like: Tensor, what: str) -> None:
    """Raise ValueError unless ``tensor`` has the shape of ``like``, which the message calls ``what``."""
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: must have the shape of {what}, {list(like.shape)}, got {list(tensor.shape)}.")


def check_finite(name: str, tensor: Tensor, mask: Tensor | None, fix: str) -> None:
    """Raise ValueError unless all values that are not masked are finite."""
    bad = ~tensor.isfinite()
    if mask is not None:
        bad &= mask.bool()
    if bool(bad.any()):
        raise ValueError(f"{name}: {int(bad.sum())} values are −inf or NaN; {fix}.")


def check_beta(beta: float) -> None:
    """Raise ValueError unless ``beta`` is in [0, 1]."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: must be in [0, 1], got {beta}.")


def scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return logits / temperature in float32 (float64 stays).

    Args:
        logits: [..., V].
        temperature: a number, or a tensor that broadcasts to the logits' shape without V; one of [B] is of the first
            dimension.

    Raises:
        ValueError: not positive, or of a shape that does not fit.
    """
    logits = logits.to(working_dtype(logits))
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}; greedy samples are read at 1.")
        return logits if temperature == 1 else logits / temperature
    if not bool((temperature > 0).all()):
        raise ValueError("temperature: must be positive everywhere; greedy samples are read at 1.")
    return logits / at_positions(temperature, logits).unsqueeze(-1).to(logits.dtype)


def at_positions(temperature: Tensor, logits: Tensor) -> Tensor:
    """Return the temperature of each position of [..., V] logits, [...].

    Raises:
        ValueError: it does not broadcast.
    """
    positions = logits.shape[:-1]
    if temperature.ndim == 1 and len(positions) > 1:
        temperature = temperature.reshape(-1, *[1] * (len(positions) - 1))
    try:
        return temperature.expand(positions)
    except RuntimeError as error:
        raise ValueError(
            f"temperature: of shape {list(temperature.shape)} does not broadcast to the positions {list(positions)}."
        ) from error
