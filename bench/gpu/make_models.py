"""Folders with a config and a tokenizer but no weights, for ``--load-format dummy``.

    python -m bench.gpu.make_models TARGET [--tokenizer FOLDER ...]

The configs have the published dimensions of Qwen2.5; the tokenizer, which says nothing about the speed, is SmolLM2's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = next(path for path in HERE.parents if (path / "pyproject.toml").is_file())
TOKENIZERS = (HERE / "tokenizer", ROOT / "models" / "smollm2-135m-instruct")

# hidden, intermediate, layers, heads, kv heads, rows of the logits, tied
SIZES = {
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
}


def config(name: str) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SIZES[name]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "vocab_size": vocabulary,
    }


def make(target: Path, tokenizers: tuple[Path, ...] = TOKENIZERS) -> None:
    """Write one folder a size under ``target``.

    Args:
        tokenizers: folders of which the first that has ``tokenizer.json``, or that packed by gzip, is taken.

    Raises:
        FileNotFoundError: none of them has it.
    """
    source = next((path for path in tokenizers if any(path.glob("tokenizer.json*"))), None)
    if source is None:
        raise FileNotFoundError(
            f"no tokenizer.json in any of {', '.join(map(str, tokenizers))}; `make model` makes it."
        )
    packed = source / "tokenizer.json.gz"
    tokenizer = gzip.decompress(packed.read_bytes()) if packed.is_file() else (source / "tokenizer.json").read_bytes()
    for name in SIZES:
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config(name), indent=1))
        for file in ("tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(source / file, folder)
        (folder / "tokenizer.json").write_bytes(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--tokenizer", type=Path, nargs="+", default=TOKENIZERS, help="Folders to look in.")
    args = parser.parse_args()
    make(args.target, tuple(args.tokenizer))


if __name__ == "__main__":
    main()
