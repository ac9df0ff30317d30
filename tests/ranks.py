"""Processes that work together, over gloo on the CPU.

The store through which they find each other listens before they start, in this process and on a port that the system
chose: a port that was free a moment ago may be another test's by the time rank 0 would listen there.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def start_ranks(work: Callable[..., None], *arguments: Any, world: int) -> None:
    """Call `work`(rank, port, *arguments), which begins with `find_each_other`, in `world` processes; wait for them."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # The server imports these once, for all of them.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "transformers", "peft", "tiny"])
    torch.multiprocessing.start_processes(work, (store.port, *arguments), nprocs=world, start_method="forkserver")


def written_by_ranks(work: Callable[..., None], *arguments: Any, world: int) -> Any:
    """A fixture of a module with `inputs`: the folder in which `work`(rank, port, inputs, folder, *arguments) of every
    rank has written."""

    @pytest.fixture(scope="module")
    def out(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        start_ranks(work, str(inputs), str(folder), *arguments, world=world)
        return folder

    return out


def find_each_other(rank: int, port: int, world: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is there: rank 0 makes none
    torch.set_num_threads(1)
