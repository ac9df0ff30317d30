"""Which layers get the base's weights back: sets by hand, and the recipe they make."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from palimpsest.files import UserError
from script_files import load_script

SCRIPT = Path(__file__).parent.parent / "scripts" / "layers_to_restore.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("layers_to_restore")


def results() -> dict[str, list[dict[str, Any]]]:
    """Six layers. Shares move by 0, 4, 1, 3, 0 and 2 hundredths; weights by the mean of two matrices."""
    base = [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]
    tuned = [0.2, 0.16, 0.21, 0.23, 0.1, 0.12]
    common = {"modality": "text", "kind": "all", "reduction": "signed_sum"}
    layers = [
        {**common, "model": model, "layer": layer, "share": share}
        for model, shares in (("base", base), ("full", tuned))
        for layer, share in enumerate(shares)
    ]
    layers += [{**common, "model": "full", "layer": 0, "kind": "q", "share": 0.9}]
    layers += [{**common, "model": "full", "layer": 4, "reduction": "per_batch_abs", "share": 0.9}]
    norms = [(1.0, 3.0), (0.5, 0.5), (5.0, 0.0), (1.0, 1.0), (0.0, 9.0), (2.0, 2.0)]
    delta = [{"method": "full", "layer": layer, "relative_norm": norm} for layer, of in enumerate(norms) for norm in of]
    return {"layers": layers, "delta": [*delta, {"method": "lora", "layer": 1, "relative_norm": 99.0}]}


def test_the_sets_of_layers(script: ModuleType) -> None:
    chosen = script.layers_to_restore(results(), "full", 2)
    assert chosen["shifted"] == [1, 3]
    assert chosen["changed"] == [2, 4]  # means 2, 0.5, 2.5, 1, 4.5, 2
    assert chosen["steady"] == [0, 4]
    drawn = [chosen[f"random{seed}"] for seed in range(3)]
    assert all(len(set(layers)) == 2 and set(layers) <= set(range(6)) for layers in drawn)
    assert chosen == script.layers_to_restore(results(), "full", 2)


def test_what_is_printed_is_a_recipe_of_methods(script: ModuleType) -> None:
    from palimpsest.training.methods import Method

    text = script.as_methods("full-5e-4", {"shifted": [1, 3], "random0": [0, 5]})
    methods = yaml.safe_load("methods:\n" + text)["methods"]
    assert set(methods) == {"shifted_back", "random0_back"}
    for name, layers in (("shifted_back", (1, 3)), ("random0_back", (0, 5))):
        values = {**methods[name], "layers": tuple(methods[name]["layers"])}
        assert Method(**values) == Method(kind="blend", of="full-5e-4", scale=0, layers=layers, curve=name)


def test_shares_are_of_one_reduction(script: ModuleType) -> None:
    """The base's first reduction is one that the tuned model does not have."""
    found = results()
    other = [{**row, "reduction": "other", "share": 1 / 6} for row in found["layers"] if row["model"] == "base"]
    again = script.layers_to_restore({**found, "layers": [*other, *found["layers"]]}, "full", 2)
    assert again == script.layers_to_restore(found, "full", 2)


@pytest.mark.parametrize("damaged", [{}, [], {"layers": None, "delta": []}, {"layers": [{"model": "base"}]}, 3])
def test_damaged_results_are_a_sentence(script: ModuleType, damaged: Any) -> None:
    with pytest.raises(UserError, match=r"no tables layers and delta as a study writes them.*continue the run"):
        script.layers_to_restore(damaged, "full", 2)


def test_layers_without_a_number_are_not_chosen_among(script: ModuleType) -> None:
    """Sets of fewer than N layers could not be compared with the others."""
    found = results()
    fewer = {**found, "delta": [row for row in found["delta"] if row["layer"] != 2]}
    other = {**found, "layers": [row for row in found["layers"] if (row["model"], row["layer"]) != ("full", 5)]}
    nan = {**found, "layers": [{**row, "share": float("nan")} for row in found["layers"]]}
    for damaged in (fewer, other, nan):
        with pytest.raises(UserError, match=r"layers of full in this run's results.json are not the base's"):
            script.layers_to_restore(damaged, "full", 2)


def test_what_cannot_be_chosen_is_a_sentence(script: ModuleType) -> None:
    with pytest.raises(UserError, match=r"layer_lr has no importance or no change.*continue the run"):
        script.layers_to_restore(results(), "layer_lr", 2)
    with pytest.raises(UserError, match=r"--n is 4; of 6 layers 1 to 3"):
        script.layers_to_restore(results(), "full", 4)
