"""How sure a share, or a difference of two, is."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, see https://doi.org/10.1080/01621459.1927.10502953.

    scipy has it too, but takes a second to be imported, which a report has no other need of.
    """
    share = successes / total
    centre = share + _Z**2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total * total))
    scale = 1 + _Z**2 / total
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return (low if successes else 0.0), (high if successes < total else 1.0)


def more_often(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the first share, (count, total), is greater than the second by more than chance explains: Newcombe's 95 %
    interval of the difference of two shares is above 0, see https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8."""
    (low, _), (_, high) = wilson(*one), wilson(*other)
    p, q = one[0] / one[1], other[0] / other[1]
    return p - q > math.hypot(p - low, high - q)


def mcnemar(only_one: int, only_other: int) -> float:
    """McNemar's exact test (1947), two-sided: p, of how many pairs one alone has, and the other."""
    from scipy import stats

    discordant = only_one + only_other
    return float(stats.binomtest(only_one, discordant).pvalue) if discordant else 1.0
