"""The mathematics of mixing: tensors in, tensors out. Imports torch only."""

from sglang_optimal.mixing.alpha import ALPHA_METHODS, AlphaMethod, AlphaParams
from sglang_optimal.mixing.diagnostics import Diagnostics, diagnose
from sglang_optimal.mixing.mixture import Mixture, mix, token_logprobs

__all__ = [
    "ALPHA_METHODS",
    "AlphaMethod",
    "AlphaParams",
    "Diagnostics",
    "Mixture",
    "diagnose",
    "mix",
    "token_logprobs",
]
