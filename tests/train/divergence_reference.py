"""Divergences in float64 by their textbook sums over the whole vocabulary; shares no code with the package."""

from __future__ import annotations

import numpy as np


def softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)


def jsd(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def divergence(name: str, p: np.ndarray, s: np.ndarray, beta: float = 0.5) -> np.ndarray:
    """p: the target. s: the student."""
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return kl(p, s)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return kl(s, p)
    return jsd(p, s, beta)


def lump(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[..., k + 1]: the masses of the ids and of all others."""
    at = np.take_along_axis(p, ids, -1)
    rest = p.copy()
    np.put_along_axis(rest, ids, 0.0, -1)
    return np.concatenate([at, rest.sum(-1, keepdims=True)], -1)
