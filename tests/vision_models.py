"""Tiny random multimodal models, with processors: what reads text of them is as wide as in `tiny_models`."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from recurrent_models import DELTA_NETS, EXPERTS
from safetensors.torch import load_file, save_file
from tiny_models import build_small_tokenizer, randomize

_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # 64, 65, 66, 67
_QWEN_IDS = {"vision_start_token_id": 64, "vision_end_token_id": 65, "image_token_id": 66, "video_token_id": 67}
_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
VOCAB = 72


def _text(layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _qwen2_5_vl(layers: int) -> Any:
    text = _text(layers, rope_parameters=_ROPE, use_sliding_window=False)
    tower = {**_TOWER, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=False, **_QWEN_IDS)


def _qwen3_vl(layers: int) -> Any:
    text = _text(layers, head_dim=16, rope_parameters=_ROPE)
    tower = {**_TOWER, "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=False, **_QWEN_IDS)


def _qwen3_5(layers: int, kind: str = "Qwen3_5Config", **more: Any) -> Any:
    """With recurrent layers; its published checkpoints are all of this class."""
    types = ["linear_attention", "full_attention"] * layers
    text = _text(2 * layers, rope_parameters=_ROPE, layer_types=types, **DELTA_NETS, **more)
    tower = {**_TOWER, "patch_size": 16, "num_position_embeddings": 16}
    config = getattr(transformers, kind)
    return config(text_config=text, vision_config=tower, tie_word_embeddings=False, **_QWEN_IDS)


def _qwen3_5_moe(layers: int) -> Any:
    return _qwen3_5(layers, "Qwen3_5MoeConfig", **EXPERTS)


def _gemma3(layers: int) -> Any:
    text = _text(layers, head_dim=16, sliding_window=4096, query_pre_attn_scalar=64)
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    return transformers.Gemma3Config(
        text_config={**text, "tie_word_embeddings": True}, vision_config=tower, mm_tokens_per_image=4,
        boi_token_index=64, eoi_token_index=65, image_token_index=66,
    )  # fmt: skip


def _qwen_processor(tokenizer: Any, config: Any) -> Any:
    version = "2_5_" if config.model_type == "qwen2_5_vl" else "3"
    patch = config.vision_config.patch_size
    sizes = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    image = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56 * 4, **sizes)
    video = getattr(transformers, f"Qwen{version[0]}VLVideoProcessor")(patch_size=patch)
    processor = getattr(transformers, f"Qwen{version}VLProcessor")
    return processor(image, tokenizer, video, chat_template=tokenizer.chat_template)


def _gemma_processor(tokenizer: Any, config: Any) -> Any:
    image = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return transformers.Gemma3Processor(image, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4)


FAMILIES: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "qwen2.5-vl": (_qwen2_5_vl, _qwen_processor, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "qwen3-vl": (_qwen3_vl, _qwen_processor, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "qwen3.5": (_qwen3_5, _qwen_processor, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "qwen3.5-moe": (_qwen3_5_moe, _qwen_processor, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}),
    "gemma3": (
        _gemma3,
        _gemma_processor,
        {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"},
    ),
}
"""{name: (its configuration, its processor, names that the processor asks the tokenizer for)}."""


def build_tiny_vision_model(path: Path, *, seed: int, family: str, num_layers: int = 2) -> Path:
    """A random float32 model that sees images, with the 64-token tokenizer and four tokens more, at ``path``."""
    configuration, processor, names = FAMILIES[family]
    config = configuration(num_layers)
    config.dtype = torch.float32
    model = transformers.AutoModelForImageTextToText.from_config(config)
    tied = config.text_config.tie_word_embeddings
    randomize(model, seed=seed, logit_std=1.5, embedding_std=1.5 / 8 if tied else 1.0)
    model.to(torch.float32).save_pretrained(path)
    _as_published(path, family)
    with tempfile.TemporaryDirectory() as scratch:
        folder = build_small_tokenizer(Path(scratch))
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
        tokenizer.save_pretrained(folder / "more")
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "more", **names)
        assert tokenizer.convert_tokens_to_ids(list(_SPECIAL)) == [64, 65, 66, 67]
        processor(tokenizer, config).save_pretrained(path)
        shutil.copyfile(folder / "chat_template.jinja", path / "chat_template.jinja")
    return path


def _as_published(path: Path, family: str) -> None:
    """What published checkpoints have and transformers 5 does not write."""
    if family == "gemma3":  # a name more in the tower's tensors
        weights = load_file(path / "model.safetensors")
        named = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in weights.items()}
        save_file(named, path / "model.safetensors", metadata={"format": "pt"})
    if family.startswith("qwen3.5"):
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["full_attention_interval"] = 2
        (path / "config.json").write_text(json.dumps(config))
