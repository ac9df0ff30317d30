"""examples/your_model.ipynb: as it is committed, and run cell by cell. A notebook is JSON, so that takes no Jupyter."""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from tiny import tiny_llama, tiny_tokenizer

NOTEBOOK = Path(__file__).parent.parent / "examples" / "your_model.ipynb"
FILE: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = FILE["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
PROSE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]


# ---------------------------------------------------------------------------------------------------------------------
# As it is committed
# ---------------------------------------------------------------------------------------------------------------------
def test_it_is_a_notebook_without_outputs_and_without_the_machine_it_ran_on() -> None:
    assert (FILE["nbformat"], FILE["nbformat_minor"]) == (4, 5)
    assert FILE["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        if cell["cell_type"] == "code":
            assert set(cell) == {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
        else:
            assert set(cell) == {"cell_type", "id", "metadata", "source"}
        assert set(cell["metadata"]) <= {"tags"}


def test_every_cell_is_introduced_and_compiles() -> None:
    kinds = [cell["cell_type"] for cell in CELLS]
    assert 1 <= kinds.count("code") <= 12
    assert all(kinds[i - 1] == "markdown" for i, kind in enumerate(kinds) if kind == "code")
    for cell in CODE:
        compile(cell, "cell", "exec")


def test_every_name_it_imports_is_there() -> None:
    imported = [node for cell in CODE for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, it.name) for node in imported for it in node.names if (node.module or "").startswith("palim")]
    assert ("palimpsest", "estimate_importance") in ours
    assert [name for module, name in ours if not hasattr(import_module(str(module)), name)] == []


def test_its_links_lead_somewhere() -> None:
    targets = [target for text in PROSE for target in re.findall(r"\]\(([^)#\s]+)", text)]
    assert targets
    assert [it for it in targets if not (NOTEBOOK.parent / it).exists()] == []


# ---------------------------------------------------------------------------------------------------------------------
# Run
# ---------------------------------------------------------------------------------------------------------------------
def executed(folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any) -> dict[str, Any]:
    """What the cells leave, run in order. `parameters` are set after the first cell, as papermill sets them."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(NOTEBOOK.parent)  # where Jupyter would run it
    names: dict[str, Any] = {}
    for number, cell in enumerate(CODE):
        exec(compile(cell, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
        if number == 0:
            assert set(parameters) <= set(names)
            names.update(parameters)
    return names


@pytest.fixture(autouse=True)
def _no_windows() -> Any:
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    yield
    plt.close("all")


def saved(folder: Path, factor: float) -> str:
    """A tiny model whose second layer is multiplied."""
    model = tiny_llama(eos_token_id=3)
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter *= factor
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


TINY = {"n_questions": 48, "n_texts": 4}


def test_run_on_a_pair_of_which_one_layer_was_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = saved(tmp_path / "base", 1.0), saved(tmp_path / "tuned", 1.5)
    names = executed(tmp_path, monkeypatch, base_name=base, tuned_name=tuned, **TINY)
    assert names["change"] == pytest.approx([0.0, 0.5])
    shares = names["shares"]
    assert [sum(share) for share in shares.values()] == pytest.approx([1.0] * 3)
    # Jensen–Shannon of two pairs of shares, by hand.
    p, q = shares["base"], shares["tuned"]
    middle = (p + q) / 2
    by_hand = sum((a * np.log2(a / middle)).sum() / 2 for a in (p, q))
    shift = {row["measure"]: row for row in names["shift"]}
    assert shift["jensen_shannon"]["value"] == pytest.approx(by_hand, rel=1e-6)
    assert shift["jensen_shannon"]["noise_floor"] > 0
    assert shift["jensen_shannon"]["ci_low"] is not None  # enough batches for an interval
    assert {row["text"] for row in names["drift"]} == {"plain", "chat"}
    # KL from the base to the tuned model at every token of the first text, by hand.
    text, drift = names["texts"][0], names["drifts"][0]
    ids, at = torch.tensor([[*text.prompt_ids, *text.ids]]), slice(len(text.prompt_ids) - 1, -1)
    with torch.no_grad():
        log_p, log_q = (names[it](ids).logits[0, at].double().log_softmax(-1) for it in ("base", "tuned"))
    assert drift.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).tolist(), rel=1e-4)
    left, middle_axes, right = names["figure"].axes
    assert [list(line.get_ydata()) for line in left.lines] == [list(100 * share) for share in shares.values()]
    assert [bar.get_height() for bar in middle_axes.patches] == names["change"]
    assert len(right.lines) == 2
    printed = capsys.readouterr().out
    assert "layer  1  ‖ΔW‖/‖W‖ 0.50000" in printed


def test_run_on_a_model_and_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", 1.0)
    names = executed(tmp_path, monkeypatch, base_name=base, tuned_name=base, n_questions=6, n_texts=2)
    assert names["change"] == [0.0, 0.0]
    assert [row["value"] for row in names["shift"] if row["measure"] == "jensen_shannon"] == [0.0]
    assert all((row["kl"], row["agreement"]) == (0.0, 1.0) for row in names["drift"])


@pytest.mark.slow
def test_run_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small pair, which is trained at a rate that is too high: far from its base on all text."""
    names = executed(tmp_path, monkeypatch)
    assert (tmp_path / "runs" / "tuned" / "model.safetensors").exists()
    assert min(names["change"]) > 0
    assert all(row["kl"] > 0.1 for row in names["drift"] if row["tokens"] == "all")
