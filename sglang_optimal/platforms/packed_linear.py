"""Linear layers on a CPU with their weights in oneDNN's own layout, which PyTorch otherwise makes anew in each call.

The plain weights stay: updates are written to them, and what else reads a layer's weight finds it.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import psutil
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

from sglang_optimal.platforms.cpu_dtype import has_bfloat16

logger = logging.getLogger(__name__)

_SHARE_OF_FREE_MEMORY = 0.25
"""Where packed weights would take more, there are none."""
_ROWS = 8
"""Rows that weights are laid out for: a decode step's."""
_FLOAT32_ROWS = 64
"""Beyond, PyTorch's float32 product (MKL's) is the faster one: 1.4 times at 1,536 rows. In bfloat16 it never is."""
_packed: weakref.WeakSet[_Packed] = weakref.WeakSet()


class _Packed:
    """One weight [out, in], plain and packed.

    Attributes:
        weight: None after the plain one has changed, until it is used: an update comes in many pieces, and may be
            another model's.
    """

    def __init__(self, plain: Tensor):
        self.plain = plain
        self.weight: Tensor | None = self._pack()
        _packed.add(self)

    def _pack(self) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.plain.detach(), _ROWS)

    def forget(self) -> None:
        self.weight = None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype is torch.float32 and x.numel() > _FLOAT32_ROWS * x.shape[-1]:
            return torch.nn.functional.linear(x, self.plain, bias)
        if self.weight is None:
            self.weight = self._pack()
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")


class PackedUnquantizedLinearMethod(UnquantizedLinearMethod):
    """SGLang's, on a packed weight."""

    def __init__(self, packed: _Packed):
        super().__init__()
        self._packed = packed

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """In one call of oneDNN's."""
        return self._packed.linear(x, bias)


class PackedUnquantizedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """SGLang's, on a packed weight where it is the head; `LogitsProcessor` asks for any method it does not know."""

    def __init__(self, packed: _Packed):
        super().__init__()
        self._packed = packed

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits, in one call of oneDNN's."""
        return self._packed.linear(x.to(self._packed.plain.dtype), bias)


_METHODS: dict[type, type] = {
    UnquantizedLinearMethod: PackedUnquantizedLinearMethod,
    UnquantizedEmbeddingMethod: PackedUnquantizedEmbeddingMethod,
}


def pack(model: torch.nn.Module) -> None:
    """Pack the weights of a model's linear layers and of its head, where there is memory for it."""
    layers: list[Any] = [layer for layer in model.modules() if _can_be_packed(layer)]
    if not _heads_are_plain(model):
        layers = [layer for layer in layers if type(layer.quant_method) is not UnquantizedEmbeddingMethod]
    size = sum(layer.weight.nbytes for layer in layers)
    free = psutil.virtual_memory().available
    if size > _SHARE_OF_FREE_MEMORY * free:
        logger.info("linear layers stay as they are: packed ones take %.1f GB, %.1f are free", size / 1e9, free / 1e9)
        return
    for layer in layers:
        layer.quant_method = _METHODS[type(layer.quant_method)](_Packed(layer.weight))


def _can_be_packed(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return (
        type(getattr(layer, "quant_method", None)) in _METHODS
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and (weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and has_bfloat16()))
    )


def _heads_are_plain(model: torch.nn.Module) -> bool:
    """Whether logits are computed in the weights' type."""
    processors: list[Any] = [module for module in model.modules() if hasattr(module, "use_fp32_lm_head")]
    return all(not module.use_fp32_lm_head and module.rl_on_policy_target is None for module in processors)


def forget() -> None:
    """Plain weights have changed, whichever: each is packed anew when it is used next."""
    for packed in _packed:
        packed.forget()


def watch_updates() -> None:
    """Have SGLang's updates of weights followed by `forget`."""
    base = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
    HookRegistry.register(base + "update_weights_from_disk", _after_update, HookType.AFTER)
    HookRegistry.register(base + "load_weights_from_distributed", _after_update, HookType.AFTER)
    HookRegistry.register(base + "update_weights_from_tensor", _after_update, HookType.AFTER)
    HookRegistry.register(base + "update_weights_from_ipc", _after_update, HookType.AFTER)
    HookRegistry.register(base + "end_weight_update", _after_update, HookType.AFTER)
    HookRegistry.apply_hooks()


def _after_update(result: Any, *args: Any, **kwargs: Any) -> None:
    forget()
