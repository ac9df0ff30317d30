"""The library's functions in a plain loop give the weights that `train` gives, bit for bit on one CPU machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from palimpsest.config import parse_config
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.study import steps
from palimpsest.study.run import Study, run_study
from palimpsest.training.methods import Method
from palimpsest.training.train import Settings, train
from spoken import spoken
from tiny import tiny_llama, tiny_speech_lm

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "plain_loop.py"
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def plain_loop() -> Any:
    spec = importlib.util.spec_from_file_location("plain_loop", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Example], Collator]:
    return spoken(tmp_path_factory.mktemp("audio"))


@pytest.mark.parametrize(
    "method",
    [
        Method("full", learning_rate=1e-3, adaptor_learning_rate=1e-2),
        Method("layer_lr", learning_rate=1e-3),
        Method("lora", learning_rate=1e-2, rank=2, dropout=0.2),
    ],
    ids=lambda method: method.kind,
)
def test_the_plain_loop_gives_the_weights_of_train(setup: Any, tmp_path: Path, method: Method) -> None:
    settings = Settings(epochs=2, batch_size=3, warmup_ratio=0.2, weight_decay=0.1, seed=5)
    scales = {0: 1.0, 1: 0.6} if method.kind == "layer_lr" else None
    ours, theirs = tiny_speech_lm()[0], tiny_speech_lm()[0]
    train(ours, *setup, method, settings, tmp_path, name="m", scales=scales)
    plain_loop().train(theirs, *setup, method, settings, scales)
    start, expected, found = tiny_speech_lm()[0].state_dict(), ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not torch.equal(start["adaptor.linear1.weight"], found["adaptor.linear1.weight"])


def test_the_loop_is_short() -> None:
    body = SCRIPT.read_text(encoding="utf-8").split("def train(")[1].split("def main(")[0]
    code = [line for line in body.splitlines() if line.strip() and '"""' not in line]
    assert len(code) <= 30


@pytest.mark.slow
def test_the_demos_methods_on_the_embedded_models(tmp_path: Path) -> None:
    """The demo's models, voice, prompts and settings, on 16 of its questions: two steps of each of its methods."""
    values = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    values["data"]["train"]["limit"], values["data"]["heldout"]["limit"] = 16, 1
    values["evaluation"]["tasks"][0]["limit"] = 1
    study = Study(parse_config(values, "demo"), tmp_path)
    steps.data(study.ws)
    steps.features(study.ws)
    n_layers = study.ws.base.config.num_hidden_layers
    examples, collator = study.ws.groups["train"], study.ws.collator("speech", "train")
    for name, options in study.ws.config.methods.items():
        method = options
        scales = {i: 1 - 0.4 * i / n_layers for i in range(n_layers)} if method.kind == "layer_lr" else None
        ours, theirs = study.ws.new_speech_lm(name), study.ws.new_speech_lm(name)
        records = train(ours, examples, collator, method, study.ws.settings, tmp_path / name, name=name, scales=scales)
        plain_loop().train(theirs, examples, collator, method, study.ws.settings, scales)
        assert len(records) == 2
        found = theirs.state_dict()
        assert all(torch.equal(found[key], value) for key, value in ours.state_dict().items()), name


@pytest.mark.slow
def test_the_script_on_a_finished_study(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "recipes" / "demo-quick.yaml").read_text(encoding="utf-8"))
    values["models"]["compute"] = "float32"  # the script is a process of its own
    values["methods"] = {"layer_lr": values["methods"]["layer_lr"]}
    values["data"]["train"]["limit"], values["data"]["heldout"]["limit"] = 8, 2
    values["importance"], values["deactivation"] = {"n_examples": 4, "batch_size": 4}, {"random_seeds": 1}
    values["evaluation"]["tasks"][0]["limit"] = 2
    run_study(parse_config(values, "demo"), tmp_path / "run")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), "layer_lr"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.strip() == "layer_lr: largest difference of a weight from the study's checkpoint: 0"


# -- docs/training.md -------------------------------------------------------------------------------------------------
def snippet(heading: str) -> str:
    section = PAGE.split(f"\n### {heading}\n")[1].split("\n#")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    return str(code)


def text_batches(n: int = 3) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, 300, (n, 2, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def moved(before: Any, model: Any) -> dict[str, float]:
    """How far each layer's down projection went from the start."""
    return {
        str(i): float((layer.mlp.down_proj.weight - before.model.layers[i].mlp.down_proj.weight).detach().norm())
        for i, layer in enumerate(model.model.layers)
    }


def test_the_page_in_a_plain_loop() -> None:
    model = tiny_llama()
    names: dict[str, Any] = {"model": model, "batches": text_batches()}
    exec(snippet("In a plain loop"), names)
    assert sorted({group["scale"] for group in names["optimizer"].param_groups}) == pytest.approx([0.6, 1.0])
    assert all(distance > 0 for distance in moved(tiny_llama(), model).values())


def test_the_page_in_trainer(tmp_path: Path) -> None:
    model = tiny_llama()
    rows = [{key: value[0] for key, value in batch.items()} for batch in text_batches()]
    names: dict[str, Any] = {"model": model, "scales": {0: 1.0, 1: 0.0}, "dataset": rows, "folder": str(tmp_path)}
    exec(snippet("In transformers' Trainer"), names)
    distances = moved(tiny_llama(), model)
    assert distances["0"] > 0
    assert distances["1"] == 0  # a scale of 0 is a rate of 0
