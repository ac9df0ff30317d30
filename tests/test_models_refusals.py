"""What is given first in the place of a model: each is named, with what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from palimpsest.files import UserError
from palimpsest.models.loading import load_language_model, resolve
from tiny import save_tiny_models


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder / "llm"


def with_files(*names: str) -> Callable[[Path], Path]:
    """A folder with these files, empty."""

    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            with_files("tokenizer.json", "tokenizer_config.json"),
            r"x holds a tokenizer \(tokenizer\.json\) and no model;",
        ),
        (
            with_files("model-Q4_K_M.gguf"),
            r"model-Q4_K_M\.gguf is a GGUF file, .*; give the folder of a .* was made from",
        ),
        (with_files("optimizer.pt", "scheduler.pt"), r"x holds a state of training \(optimizer\.pt\) and no weights"),
        (with_files("config.json", "optimizer.pt"), r"x holds a state of training \(optimizer\.pt\) and no weights"),
        (
            with_files("config.json", "tokenizer.json"),
            r"x has a config but no weights \(\*\.safetensors\); the checkpoint",
        ),
        (
            with_files("model.safetensors"),
            r"x has weights and no config\.json; put the config of the model beside them",
        ),
        (
            with_files("global_step20/mp_rank_00_model_states.pt", "optimizer.pt"),
            r"parts of several processes \(global_s",
        ),
        (with_files("README.md"), r"x has no config\.json; give the folder of a Hugging Face checkpoint"),
        (
            with_files("checkpoint-500/config.json", "checkpoint-1000/config.json", "trainer_state.json"),
            r"x is the folder of a training run; give one of its .*, such as .*x/checkpoint-1000 \(the last of 2\)",
        ),
        (with_files("tokenizer.json", "checkpoint-20/adapter_config.json"), r"such as .*x/checkpoint-20\."),
        (
            with_files("methods/full/checkpoint/config.json"),
            r"run directory of a study; .* .*x/methods/full/checkpoint\.",
        ),
        (lambda folder: with_files("model.gguf")(folder) / "model.gguf", r"model\.gguf is a GGUF file"),
        (lambda folder: with_files("optimizer.pt")(folder) / "optimizer.pt", r"optimizer\.pt is a state of training"),
        (lambda folder: with_files("notes.txt")(folder) / "notes.txt", r"notes\.txt is a file; give the folder of a"),
    ],
)
def test_it_is_named_with_what_to_give(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve(str(make(tmp_path / "x")))


def test_a_file_of_a_checkpoint(llm: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors is one file of a checkpoint; give its folder, .*llm\."):
        resolve(str(llm / "model.safetensors"))


def test_a_run_s_folder_that_is_a_checkpoint_itself_is_taken(llm: Path) -> None:
    """A Trainer saves the last model beside its checkpoints."""
    (llm / "checkpoint-500").mkdir()
    assert resolve(str(llm)) == str(llm)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_that_is_missing(llm: Path, tmp_path: Path, with_index: bool) -> None:
    model, tokenizer = load_language_model(str(llm))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    if not with_index:
        (tmp_path / "model.safetensors.index.json").unlink()
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(UserError, match=rf"lacks {second.name}, .*copy or download the checkpoint again"):
        resolve(str(tmp_path))
