"""What stands at a path that is no model's folder, and what to give instead: a sentence for each of the usual slips."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SHARDED = ("pytorch_model_fsdp_0", "global_step*", "zero_to_fp32.py")  # of FSDP and DeepSpeed
TRAINED = re.compile(r"checkpoint-(\d+)")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
WANTED = "the folder of a Hugging Face checkpoint (config.json and *.safetensors)"


def file_refusal(file: Path) -> str:
    """For a file in the place of a folder."""
    if file.suffix == ".gguf":
        return _of_gguf(file)
    if file.name in OPTIMIZER:
        return f"{file} is a state of training and no model; give {WANTED}."
    if (file.parent / "config.json").exists() or (file.parent / "adapter_config.json").exists():
        return f"{file} is one file of a checkpoint; give its folder, {file.parent}."
    return f"{file} is a file; give {WANTED}."


def folder_refusal(folder: Path) -> str:
    """For a folder that lacks a model's config or its weights."""
    has_config, has_weights = (folder / "config.json").exists(), any(_weights(folder))
    if trained := _trained(folder):
        of = f" (the last of {len(trained)})" if len(trained) > 1 else ""
        return f"{folder} is the folder of a training run; give one of its checkpoints, such as {trained[-1]}{of}."
    if models := sorted(folder.glob("methods/*/checkpoint")):
        return f"{folder} is a run directory of a study; give one of its models, such as {models[0]}."
    if has_weights:
        return f"{folder} has weights and no config.json; put the config of the model beside them, or give {WANTED}."
    if found := sorted(folder.glob("*.gguf")):
        return _of_gguf(found[0])
    if found := [path for pattern in SHARDED for path in sorted(folder.glob(pattern))]:
        return (
            f"{folder} holds the weights in the parts of several processes ({found[0].name}); put them together "
            "(`accelerate merge-weights`, or DeepSpeed's zero_to_fp32.py) and give the folder of that."
        )
    if found := [folder / name for name in OPTIMIZER if (folder / name).exists()]:
        return f"{folder} holds a state of training ({found[0].name}) and no weights; give {WANTED}."
    if not has_config and (found := [folder / name for name in TOKENIZER if (folder / name).exists()]):
        return f"{folder} holds a tokenizer ({found[0].name}) and no model; give {WANTED}."
    if has_config:
        return f"{folder} has a config but no weights (*.safetensors); the checkpoint is incomplete."
    return f"{folder} has no config.json; give the folder of a Hugging Face checkpoint."


def missing_parts(folder: Path) -> list[str]:
    """Files that the numbers in others' names promise ("model-00001-of-00003.safetensors") and that are not there."""
    parts = [match for path in _weights(folder) if (match := SHARD.fullmatch(path.name))]
    wanted = {
        f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}" for match in parts for number in range(1, int(match[3]) + 1)
    }
    return sorted(name for name in wanted if not (folder / name).exists())


def _weights(folder: Path) -> list[Path]:
    return [file for pattern in WEIGHT_FILES for file in sorted(folder.glob(pattern))]


def _trained(folder: Path) -> list[Path]:
    """The checkpoints that a Trainer has left in its output folder, by number."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and TRAINED.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _of_gguf(file: Path) -> str:
    return f"{file} is a GGUF file, whose weights cannot be measured as they are; give {WANTED} that it was made from."
