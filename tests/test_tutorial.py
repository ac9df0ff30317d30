"""The tutorial's commands, in order, as written (slow); the pair it makes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_the_pair_is_a_folder_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import palimpsest
    from tiny import tiny_llama, tiny_tokenizer

    spec = spec_from_file_location("small_pair", ROOT / "examples" / "small_pair.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model = tiny_llama()
    before = {name: it.clone() for name, it in model.state_dict().items()}
    monkeypatch.setattr(module, "load_language_model", lambda name: (model, tiny_tokenizer()))
    losses = module.tune("base", str(tmp_path / "tuned"), steps=12, batch_size=4)
    assert sum(losses[-3:]) < sum(losses[:3])
    tuned, _ = palimpsest.load_language_model(str(tmp_path / "tuned"))
    changed = [name for name, it in tuned.state_dict().items() if not torch.equal(it, before[name])]
    assert len(changed) == len(before)


@pytest.mark.slow
def test_the_commands_in_order(tmp_path: Path) -> None:
    assert [command.split()[:2] for command in COMMANDS[:3]] == [
        ["python", "examples/small_pair.py"],
        ["palimpsest", "drift"],
        ["palimpsest", "diagnose"],
    ]
    for command in COMMANDS:
        program, *words = (str(tmp_path / it) if it.startswith("runs/") else it for it in shlex.split(command))
        start = [sys.executable] if program == "python" else [sys.executable, "-m", "palimpsest.cli"]
        done = subprocess.run([*start, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "runs/diagnosis/report.html").stat().st_size > 10_000
