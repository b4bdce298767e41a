"""``python -m sglang_optimal.demo.loop.train``: LoRA fine-tuning on exported records, merged into a checkpoint.

TRL's SFTTrainer on prompt-completion pairs: the loss is on the sample's tokens alone.
"""

from __future__ import annotations

import argparse
import json
import sys


def train(
    model_path: str, data: str, output: str, *, epochs: float, learning_rate: float, seed: int
) -> dict[str, float]:
    """Fine-tune a model and write it, with the adapter merged, to a folder.

    Args:
        model_path: Hugging Face id or folder.
        data: file written by ``distill export --format trl-sft``.
        output: the folder.
        epochs, learning_rate, seed: as TRL has them.

    Returns:
        {"steps", "train_loss", "seconds"}
    """
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    # float32: PyTorch is slow in bfloat16 on CPUs without matrix units for it.
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    kind = "parquet" if data.endswith(".parquet") else "json"
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=f"{output}-trainer",
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            max_length=256,
            gradient_checkpointing=False,
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            bf16=False,
        ),
        train_dataset=load_dataset(kind, data_files=data, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    result = trainer.train()
    merged = trainer.model.merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "seconds": result.metrics["train_runtime"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sglang_optimal.demo.loop.train", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--data", required=True, help="Written by distill export --format trl-sft.")
    parser.add_argument("--output", required=True, help="Folder for the merged checkpoint.")
    parser.add_argument("--epochs", type=float, default=2.0, help="Default: %(default)s.")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Default: %(default)s.")
    args = parser.parse_args(argv)
    figures = train(
        args.model_path, args.data, args.output,
        epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed,
    )  # fmt: skip
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
