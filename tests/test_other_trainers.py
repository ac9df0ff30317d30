"""palimpsest scales: what other trainers would read gives the rates of `parameter_groups`, parameter by parameter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from palimpsest.commands import scales
from palimpsest.files import UserError
from palimpsest.importance.estimate import estimate_importance
from palimpsest.training.methods import layer_scales
from palimpsest.training.rules import NO_DECAY, parameter_groups
from tiny import tiny_llama

LR, LAMBDA = 3e-5, 0.6


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with more than ten layers, whose names begin like one another."""
    folder = tmp_path_factory.mktemp("scores")
    ids = torch.arange(10, 40).reshape(2, 15)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "ids": ["a", "b"]}
    estimate_importance(model(), [batch], ("signed_sum", "fisher")).save(folder)
    return folder


def model() -> Any:
    return tiny_llama(num_hidden_layers=12)


def text(scored: Path, trainer: str, **options: Any) -> str:
    return "\n".join(scales.run(scales.Options(scored, trainer, LR, LAMBDA, **options)))


def expected(scored: Path, reduction: str = "signed_sum") -> dict[str, float]:
    from palimpsest.importance.scores import Scores

    rates = layer_scales(Scores.open(scored), LAMBDA, reduction)
    assert len(set(rates.values())) == 12
    groups = parameter_groups(model(), rates, LR)
    return {name: group["lr"] for group in groups for name in group["names"]}


def test_json_and_automodel_are_patterns_of_which_the_first_counts(scored: Path) -> None:
    ours = json.loads(text(scored, "json"))
    theirs = yaml.safe_load(text(scored, "automodel"))["optimizer"]
    assert (ours["lambda"], ours["else"]["lr"], theirs["lr"]) == (LAMBDA, LR, LR)
    for name, rate in expected(scored).items():
        mine = next((rule["lr"] for rule in ours["rules"] if re.search(rule["pattern"], name)), LR)
        # AutoModel: re.search, the first that matches; unmatched parameters have the optimizer's rate.
        overrides = theirs["param_group_overrides"]
        times = next((it["lr_mult"] for it in overrides if re.search(it["pattern"], name)), 1.0)
        assert mine == rate == pytest.approx(times * LR), name
    assert all(it.keys() == {"pattern", "lr_mult"} for it in theirs["param_group_overrides"])


def test_axolotl_s_groups_are_of_decayed_weights(scored: Path) -> None:
    found = yaml.safe_load(text(scored, "axolotl"))
    lookup = {module: group["lr"] for group in found["lr_groups"] for module in group["modules"]}
    assert len(lookup) == 12
    assert found["learning_rate"] == LR
    for name, rate in expected(scored).items():
        if not NO_DECAY.search(name):  # Axolotl: the first module that is part of the name
            assert next((lr for module, lr in lookup.items() if module in name), LR) == pytest.approx(rate), name


def test_the_python_module_stands_alone_and_gives_the_same_groups(scored: Path, tmp_path: Path) -> None:
    file = tmp_path / "rates.py"
    assert text(scored, "python", out=file) == str(file)
    code = file.read_text()
    assert "import palimpsest" not in code
    assert "from palimpsest" not in code
    space: dict[str, Any] = {}
    exec(compile(code, str(file), "exec"), space)
    tuned, rates = model(), expected(scored)
    frozen = "model.layers.3.mlp.up_proj.weight"
    named = dict(tuned.named_parameters())
    named[frozen].requires_grad_(False)
    groups = space["parameter_groups"](tuned, weight_decay=0.1)
    found = {id(it): (group["lr"], group["weight_decay"]) for group in groups for it in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(named) - 1
    for name, parameter in named.items():
        if name != frozen:
            decay = 0.0 if NO_DECAY.search(name) else 0.1
            assert found[id(parameter)] == (pytest.approx(rates[name]), decay), name
    torch.optim.AdamW(groups)


def test_another_reduction_gives_other_rates(scored: Path) -> None:
    rules = json.loads(text(scored, "json", reduction="fisher"))["rules"]
    other = expected(scored, "fisher")
    assert (
        rules[4]["lr"]
        == other["model.layers.4.mlp.up_proj.weight"]
        != expected(scored)["model.layers.4.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("llamafactory", "LLaMA-Factory has one learning rate for all layers"),
        ("deepspeed", "deepspeed.initialize takes an optimizer; --as python writes"),
        ("lightning", "There is no form 'lightning'; --as python"),
    ],
)
def test_who_has_no_such_form_is_said_before_scores_are_read(tmp_path: Path, trainer: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(scales.run(scales.Options(tmp_path / "none", trainer)))


def test_a_rate_that_trains_nothing_is_refused(scored: Path) -> None:
    with pytest.raises(UserError, match="--lr is 0; give a learning rate above 0"):
        list(scales.run(scales.Options(scored, lr=0.0)))
