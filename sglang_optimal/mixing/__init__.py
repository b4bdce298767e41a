"""The mathematics of mixing: tensors in, tensors out. Nothing of SGLang."""

from sglang_optimal.mixing.alpha import ALPHA_METHODS, AlphaMethod, AlphaParams
from sglang_optimal.mixing.mixture import Mixture, compile_kernels, mix, token_logprobs

__all__ = [
    "ALPHA_METHODS",
    "AlphaMethod",
    "AlphaParams",
    "Mixture",
    "compile_kernels",
    "mix",
    "token_logprobs",
]
