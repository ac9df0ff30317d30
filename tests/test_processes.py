"""Which launch configurations are taken, and what one process does with them; several: test_training_distributed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from palimpsest import parallel as processes
from palimpsest.cli import DIVIDED, main
from palimpsest.files import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "accelerate").glob("*.yaml"))
N_PROCESSES = {"1x80gb": 1, "8x80gb": 8, "2-machines": 16}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations_and_they_are_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == N_PROCESSES[path.stem]
    command = next(line for line in path.read_text().splitlines() if "accelerate launch" in line)
    assert f"--config_file configs/accelerate/{path.name}" in command
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "palimpsest.cli"])
    arguments, *_ = _validate_launch_command(arguments)
    if config.num_processes == 1:
        environment = prepare_simple_launcher_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    processes._require_recipes_precision()
    assert processes._wants_sharding() == (config.num_processes > 1)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 1, but only FSDP2 is supported; set it to 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "weights stay on the device"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "every process loads the models itself"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "training.gradient_checkpointing decides"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "given back after their forward"),
    ],
)
def test_what_is_not_supported_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        processes._wants_sharding()


def test_the_launchers_precision_does_not_override_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"models\.compute decides"), processes.joined():
        pass


def test_one_process_is_rank_0_and_waits_for_nobody() -> None:
    with processes.joined():
        assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
        assert not processes.sharded()
        assert processes.share("value") == "value"
        processes.wait_for_all()


def test_a_command_that_does_not_divide_its_work_is_refused_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first process; the others would do, and write, the same."""
    given = ["palimpsest", "importance", "--model", "m", "--data", "d", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    slept: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", slept.append)
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = "importance works in one process and 2 were started; give the command without"
        assert (said in capsys.readouterr().err) == (number == "0")
    assert slept == [processes.SPOKEN_AFTER]
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.require_one_process("importance")
    assert {"demo", "study", "diagnose"} == set(DIVIDED)  # those that join the others (study/run.py)
