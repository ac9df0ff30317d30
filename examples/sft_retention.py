"""What an SFT with LoRA does to the base's text, measured while it trains: peft, TRL's SFTTrainer, RetentionCallback.

    pip install trl
    python examples/sft_retention.py embedded:smollm2-135m-instruct runs/sft

Its checkpoints are adapter folders, of which `palimpsest drift` finds the same drift:

    palimpsest drift MODEL "MODEL + runs/sft/checkpoint-8" --n-texts 16 --out runs/sft-drift
"""

from __future__ import annotations

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from palimpsest import RetentionCallback, load_language_model
from palimpsest.data.sources import load_examples


def train(name: str, out: str, steps: int = 8, **options) -> RetentionCallback:
    """SFT on 32 short answers; `options` are the callback's."""
    model, tokenizer = load_language_model(name)
    examples = load_examples("facts", "train", limit=32)
    rows = [
        {"prompt": [turn("user", example.question)], "completion": [turn("assistant", example.answer)]}
        for example in examples
    ]
    arguments = SFTConfig(
        out, max_steps=steps, save_steps=steps // 2, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, max_length=128, bf16=False, gradient_checkpointing=False, report_to="none",
    )  # fmt: skip
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )
    watching = RetentionCallback(trainer, every=steps // 2, **options)
    trainer.add_callback(watching)
    trainer.train()
    return watching


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    for measured in train(sys.argv[1], sys.argv[2]).history:
        print(f"step {measured.step}:", {name: round(value, 4) for name, value in measured.logged().items()})
