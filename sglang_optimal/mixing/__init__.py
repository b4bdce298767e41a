"""The mathematics of mixing: tensors in, tensors out. Nothing of SGLang. See docs/mixing.md."""

from sglang_optimal.mixing.alpha import ALPHA_METHODS, AlphaMethod, AlphaParams
from sglang_optimal.mixing.filters import SamplingFilters
from sglang_optimal.mixing.mixture import Mixture, compile_kernels, mix, token_logprobs
from sglang_optimal.mixing.series import Sides, more_series, top_k
from sglang_optimal.mixing.speculation import draw, verify, verify_greedy

__all__ = [
    "ALPHA_METHODS",
    "AlphaMethod",
    "AlphaParams",
    "Mixture",
    "SamplingFilters",
    "Sides",
    "compile_kernels",
    "draw",
    "mix",
    "more_series",
    "token_logprobs",
    "top_k",
    "verify",
    "verify_greedy",
]
