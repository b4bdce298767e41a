"""What the CPU platform puts in place of SGLang's plain PyTorch layers gives what they give."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import get_parallel

from sglang_optimal.platforms import cpu_dtype, cpu_kernels, cpu_layers, packed_linear
from sglang_optimal.platforms.cpu_sampling import draw, drawing_one_number
from sglang_optimal.platforms.torch_cpu import TorchCpuSRTPlatform

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Relative; in bfloat16 SGLang's own rounds in between as well."""


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = ROUNDING[wanted.dtype]
    assert got.dtype is wanted.dtype and got.shape == wanted.shape
    return torch.allclose(
        got.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.float().abs().max())
    )


def norm(width: int, dtype: torch.dtype, **kwargs) -> RMSNorm:
    layer = RMSNorm(width, eps=1e-5, weight_dtype=dtype, **kwargs)
    layer.weight.data.normal_()
    return layer.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width", [(1, 576), (7, 33), (300, 64), (0, 16), (2, 1)])
def test_rms_norm(rows, width, dtype):
    torch.manual_seed(0)
    layer = norm(width, dtype)
    x, residual = (5 * torch.randn(rows, width, dtype=dtype) for _ in range(2))
    kept = x.clone(), residual.clone()
    assert rows == 0 or close(cpu_layers.rms_norm_forward(layer, x), layer.forward_native(x))
    got, wanted = cpu_layers.rms_norm_forward(layer, x, residual), layer.forward_native(x, residual)
    assert rows == 0 or all(close(*pair) for pair in zip(got, wanted, strict=True))
    assert torch.equal(got[1], wanted[1]), "the sum is rounded once, as SGLang's"
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


def test_what_a_norm_does_not_do_itself(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "rms_norm", None)
    monkeypatch.setattr(cpu_kernels, "sum_rms_norm", None)
    x, more = torch.randn(3, 64), torch.randn(3, 64)
    cases = [
        (norm(64, torch.float32), (x.half(),)),
        (norm(64, torch.float32), (x.bfloat16(),)),
        (norm(64, torch.float32), (x.view(3, 1, 64),)),
        (norm(64, torch.float32), (torch.randn(64, 3).T,)),
        (norm(64, torch.float32), (x, x, more)),
        (norm(64, torch.float32, cast_x_before_out_mul=True), (x,)),
        (norm(64, torch.float32, var_hidden_size=32), (x,)),
        (norm(64, torch.float32, fp32_residual=True), (x, more)),
        (norm(64, torch.float32, override_orig_dtype=torch.bfloat16), (x,)),
    ]
    for layer, arguments in cases:
        got, wanted = cpu_layers.rms_norm_forward(layer, *arguments), layer.forward_native(*arguments)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, wanted)), strict=True):
            assert torch.equal(a, b)


def test_norms_of_what_is_not_finite():
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [3e38, 3e38]])
    for dtype in DTYPES:
        layer = norm(2, dtype)
        got, wanted = cpu_layers.rms_norm_forward(layer, x.to(dtype)), layer.forward_native(x.to(dtype))
        assert torch.equal(got.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("head,rotary", [(64, 64), (80, 32), (16, 16)])
def test_rotary(head, rotary, neox, dtype):
    torch.manual_seed(0)
    layer = RotaryEmbedding(head, rotary, 512, 10000, neox, dtype)
    layer.cos_sin_cache = layer.cos_sin_cache.to(dtype)
    qkv = torch.randn(5, head * (6 + 2 + 2), dtype=dtype)  # parts of one row, as a layer hands them on
    q, k, _ = qkv.split([head * 6, head * 2, head * 2], dim=-1)
    positions = torch.tensor([0, 511, 3, 3, 77])
    got, wanted = cpu_layers.rotary_forward(layer, positions, q, k), layer.forward_native(positions, q, k)
    assert all(close(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("position", [-1, 64, 2**40])
def test_positions_beyond_the_table_are_an_error(position):
    """As in SGLang's own, where PyTorch's index is checked, and not whatever lies there in memory."""
    layer = RotaryEmbedding(16, 16, 64, 10000, True, torch.float32)
    with pytest.raises(IndexError, match="positions"):
        cpu_layers.rotary_forward(layer, torch.tensor([0, position]), torch.randn(2, 32), torch.randn(2, 16))


def test_what_a_rotation_does_not_do_itself(monkeypatch):
    layer = RotaryEmbedding(16, 16, 512, 10000, True, torch.float32)
    q, k = torch.randn(4, 32), torch.randn(4, 16)
    positions = torch.arange(4)
    wanted = layer.forward_native(positions, q, k)
    shifted = layer.forward_native(positions, q, k, torch.ones(4, dtype=torch.int64))
    monkeypatch.setattr(cpu_kernels, "rotate", None)
    for at in (positions.to(torch.int32), positions.view(2, 2)):
        assert torch.equal(cpu_layers.rotary_forward(layer, at, q, k)[0], wanted[0])
    assert torch.equal(
        cpu_layers.rotary_forward(layer, positions, q, k, torch.ones(4, dtype=torch.int64))[1], shifted[1]
    )
    assert torch.equal(cpu_layers.rotary_forward(layer, positions, q.view(4, 2, 16), k)[1], wanted[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 10**6))
def test_attention(rows, kv_heads, share, longest, seed):
    """Against softmax in float64; with as many threads as there are tasks."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 60, (8, 50), dtype=torch.int32, generator=generator)
    k, v = torch.randn(60, kv_heads, 24, generator=generator), torch.randn(60, kv_heads, 8, generator=generator)
    q = 30 * torch.randn(rows, kv_heads * share, 24, generator=generator)
    requests = torch.randint(0, 8, (rows,), generator=generator)
    lens = torch.randint(1, longest + 1, (rows,), generator=generator)
    out = torch.empty(rows, kv_heads * share, 8)
    cpu_kernels.decode_attention(q, k, v, table, requests, lens, int(lens.max()), 0.2, out)
    for row in range(rows):
        slots = table[requests[row], : lens[row]].long()
        keys, values = (t[slots].double().repeat_interleave(share, 1) for t in (k, v))
        weights = torch.softmax(0.2 * torch.einsum("hd,thd->ht", q[row].double(), keys), -1)
        assert torch.allclose(out[row].double(), torch.einsum("ht,thd->hd", weights, values), atol=1e-5)


def test_attention_of_a_row_without_tokens():
    table, kv, q = torch.zeros(2, 9, dtype=torch.int32), torch.randn(4, 1, 8), torch.randn(2, 1, 8)
    out = torch.full((2, 1, 8), torch.nan)
    cpu_kernels.decode_attention(q, kv, kv, table, torch.tensor([0, 1]), torch.tensor([3, 0]), 3, 1.0, out)
    assert out.isfinite().all()


def test_attention_in_several_threads(monkeypatch):
    torch.manual_seed(0)
    table = torch.arange(300, dtype=torch.int32).view(3, 100)
    k, v, q = torch.randn(300, 2, 16), torch.randn(300, 2, 16), torch.randn(3, 4, 16)
    arguments = q, k, v, table, torch.arange(3), torch.tensor([100, 1, 37]), 100, 0.25
    alone, together = torch.empty(3, 4, 16), torch.empty(3, 4, 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cpu_kernels.decode_attention(*arguments, alone)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu_kernels, "_PRODUCTS_PER_THREAD", 1)
    cpu_kernels.decode_attention(*arguments, together)
    assert torch.equal(alone, together)


# -- packed weights ----------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.layer, self.head = torch.nn.Module(), torch.nn.Module()
        for part, method in ((self.layer, UnquantizedLinearMethod()), (self.head, UnquantizedEmbeddingMethod())):
            part.quant_method = method
            part.weight = torch.nn.Parameter(torch.randn(48, 32).to(dtype), requires_grad=False)
        self.layer.bias = torch.nn.Parameter(torch.randn(48).to(dtype), requires_grad=False)
        self.logits_processor = torch.nn.Module()
        self.logits_processor.use_fp32_lm_head, self.logits_processor.rl_on_policy_target = False, None

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)  # as SGLang's loaders do: PyTorch's version does not change


def outputs(model: Model, x: torch.Tensor) -> list[torch.Tensor]:
    layer, head = model.layer, model.head
    return [layer.quant_method.apply(layer, x, layer.bias), head.quant_method.apply(head, x)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_packed(dtype, rows):
    torch.manual_seed(0)
    model, x = Model(dtype), torch.randn(rows, 32, dtype=dtype)
    wanted = outputs(model, x)
    packed_linear.pack(model)
    packed = dtype is torch.float32 or cpu_dtype.has_bfloat16()
    linear, head = UnquantizedLinearMethod, UnquantizedEmbeddingMethod
    assert type(model.layer.quant_method) is (packed_linear.PackedUnquantizedLinearMethod if packed else linear)
    assert type(model.head.quant_method) is (packed_linear.PackedUnquantizedEmbeddingMethod if packed else head)
    assert all(close(*pair) for pair in zip(outputs(model, x), wanted, strict=True))


def test_new_weights_are_packed_anew():
    """Whichever way SGLang's updater was told of them."""
    packed_linear.watch_updates()
    torch.manual_seed(0)
    model, x = Model(torch.float32), torch.randn(3, 32)
    packed_linear.pack(model)
    updater = SimpleNamespace(get_model=lambda: model, _assert_weight_cache_inactive=lambda name: None, device="cpu")
    updater.custom_weight_loaders = []
    for update in (
        lambda weights: WeightUpdater.load_weights_from_distributed(updater, weights),
        lambda weights: WeightUpdater.update_weights_from_tensor(updater, weights),
        lambda weights: WeightUpdater.update_weights_from_tensor(updater, weights, load_format="direct"),
    ):
        new = torch.randn(48, 32)
        with get_parallel().override(tp_rank=0):
            assert update([("layer.weight", new), ("head.weight", -new)])[0]
        got = outputs(model, x)
        assert close(got[0], x @ new.T + model.layer.bias) and close(got[1], -(x @ new.T))


def test_what_is_not_packed(monkeypatch):
    with_exact_head = Model(torch.float32)
    with_exact_head.logits_processor.use_fp32_lm_head = True
    packed_linear.pack(with_exact_head)
    assert type(with_exact_head.head.quant_method) is UnquantizedEmbeddingMethod
    assert type(with_exact_head.layer.quant_method) is not UnquantizedLinearMethod
    half, on_an_older_processor = Model(torch.float16), Model(torch.bfloat16)
    packed_linear.pack(half)
    with monkeypatch.context() as without:
        without.setattr(packed_linear, "has_bfloat16", lambda: False)
        packed_linear.pack(on_an_older_processor)
    monkeypatch.setattr(packed_linear.psutil, "virtual_memory", lambda: SimpleNamespace(available=40_000))
    large = Model(torch.float32)
    packed_linear.pack(large)
    for model in (half, on_an_older_processor, large):
        assert type(model.layer.quant_method) is UnquantizedLinearMethod


BF16, FP16, FP32 = ({"dtype": name} for name in ("bfloat16", "float16", "float32"))


@pytest.mark.parametrize(
    "fast,quantization,config,memory,wanted",
    [
        ({"bfloat16", "float16"}, None, BF16, 8000, "auto"),
        (set(), None, BF16, 8000, "float32"),
        (set(), None, BF16, 7999, "auto"),
        (set(), None, FP32, 4000, "float32"),  # as many bytes as there are
        (set(), None, FP32, 3999, "auto"),
        (set(), "awq", BF16, 8000, "auto"),
        (set(), None, {**BF16, "quantization_config": {"quant_method": "gptq"}}, 8000, "auto"),
        # SGLang would make float16 of both, which a processor with bfloat16 may not have.
        ({"bfloat16"}, None, FP32, 8000, "float32"),
        ({"bfloat16"}, None, {"torch_dtype": "float16"}, 8000, "float32"),
        ({"bfloat16"}, None, {"model_type": "no dtype"}, 8000, "float32"),
        ({"bfloat16"}, None, {**FP32, "model_type": "gemma2"}, 8000, "auto"),  # of which it makes bfloat16
        ({"bfloat16"}, None, BF16, 8000, "auto"),
        ({"bfloat16"}, None, {"text_config": BF16}, 8000, "auto"),
        ({"float16"}, None, FP16, 8000, "auto"),
    ],
)
def test_the_dtype_that_the_processor_does_well(
    tmp_path, monkeypatch, caplog, fast, quantization, config, memory, wanted
):
    for name in ("bfloat16", "float16"):
        monkeypatch.setattr(cpu_dtype, f"has_{name}", lambda name=name: name in fast)
    monkeypatch.setattr(cpu_dtype.psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model-1.safetensors").write_bytes(bytes(600))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(400))  # of two bytes each: in float32 a quarter of 8,000
    arguments = SimpleNamespace(dtype="auto", model_path=str(tmp_path), revision=None, quantization=quantization)
    TorchCpuSRTPlatform().apply_server_args_defaults(arguments)
    assert arguments.dtype == wanted
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert cpu_dtype.chosen(str(tmp_path), None, None) == "auto"
    assert ("--dtype float32 where there is memory" in caplog.text) is (memory in (7999, 3999))


@pytest.mark.parametrize("config", ["[1, 2]", "no json", None])
def test_a_config_that_is_none_is_left_to_sglang(tmp_path, monkeypatch, config):
    for name in ("bfloat16", "float16"):
        monkeypatch.setattr(cpu_dtype, f"has_{name}", lambda: False)
    (tmp_path / "model.safetensors").write_bytes(bytes(600))
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert cpu_dtype.chosen(str(tmp_path), None, None) == "auto"


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "bfloat16"}, {"torch_dtype": "float16"}, {"dtype": "half"}, {"dtype": "float32"}, {},
        {"dtype": "float32", "model_type": "gemma3_text"},
    ],
)  # fmt: skip
def test_what_sglang_s_auto_is(config):
    from sglang.srt.configs.model_config import _get_and_verify_dtype

    assert cpu_dtype._dtypes(config)[1] is _get_and_verify_dtype({"model_type": "llama", **config}, "auto")


@pytest.mark.parametrize("path", ["nobody/has-this", "not a name", "/not/there"])
def test_a_model_that_is_not_on_this_disk_keeps_its_dtype(monkeypatch, path):
    monkeypatch.setattr(cpu_dtype, "has_bfloat16", lambda: False)
    assert cpu_dtype.chosen(path, None, None) == "auto"


def test_a_dtype_that_was_asked_for_stays(monkeypatch):
    monkeypatch.setattr(cpu_dtype, "has_bfloat16", lambda: False)
    arguments = SimpleNamespace(dtype="bfloat16")
    TorchCpuSRTPlatform().apply_server_args_defaults(arguments)
    assert arguments.dtype == "bfloat16"


def test_a_profile_can_be_asked_for():
    """SGLang asks its platform what there is to profile, and ended the server where that did not know."""
    platform = TorchCpuSRTPlatform()
    assert hasattr(torch.profiler.ProfilerActivity, platform.get_torch_profiler_activity_str())
    assert platform.get_torch_profiler_activity() is torch.profiler.ProfilerActivity.CPU


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_draws_are_distributed_as_the_probabilities():
    torch.manual_seed(0)
    probs = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    n = 100_000
    counts = torch.bincount(draw(probs.repeat(n, 1)).long(), minlength=6)
    expected = n * probs
    assert (counts[probs == 0] == 0).all()
    chi_square = ((counts - expected)[probs > 0] ** 2 / expected[probs > 0]).sum()
    assert chi_square < 13.8  # 2 degrees of freedom: once in a thousand


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
def test_the_ends_are_not_beyond_the_support(number, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, dtype: torch.full(shape, number, dtype=dtype))
    probs = torch.zeros(3, 1000)
    probs[0, 5] = probs[0, 7] = 0.5
    probs[1, 999] = 1e-30
    probs[2, :10] = 0.1
    drawn = draw(probs)
    assert drawn.dtype is torch.int32 and (probs[torch.arange(3), drawn.long()] > 0).all()
    assert drawn.tolist() == ([5, 999, 0] if number == 0 else [7, 999, 9])


def test_rows_without_a_distribution_give_a_token():
    assert 0 <= int(draw(torch.full((1, 9), math.nan))) < 9


def test_requests_with_seeds_are_drawn_by_sglang():
    sampling = drawing_one_number(lambda probs, seed, positions: (probs, seed, positions))
    probs, seed = torch.ones(1, 4), torch.tensor([7])
    assert sampling(probs, seed, seed) == (probs, seed, seed)
    assert 0 <= int(sampling(probs)) < 4
