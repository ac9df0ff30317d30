"""The command line in a process forked from this one, with a log of how much of which file is known to be on the disk.

A line of the log is "DEVICE INODE BYTES", written when os.fsync of a file has returned. What the log does not have, a
power cut may take (interrupt.py). Forked, a command has its imports behind it: whatever interrupts it meets its work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# What the commands import late, here before the first fork; they start no threads, which a fork would lose.
import matplotlib.figure
import pyarrow.parquet
import scipy.stats
import soundfile
import torch.distributed.tensor
import transformers.trainer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, WhisperModel

from palimpsest import cli

IMPORTED = [
    *(matplotlib.figure, pyarrow.parquet, scipy.stats, soundfile, torch.distributed.tensor, transformers.trainer),
    *(AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, WhisperModel),
]


# By default a bar takes a lock that all forks share, which a child that is killed inside would hold for ever.
tqdm.set_lock(threading.RLock())


@dataclass
class Child:
    """A running command line, the leader of its own process group."""

    process: int
    said: Path  # its stderr
    returncode: int | None = None

    def wait(self, seconds: float = float("inf")) -> int | None:
        """The exit code (of a signal: minus its number), or None if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self.returncode is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(0.002)
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # between its fork and setsid it leads no group
            os.kill(self.process, signal.SIGKILL)
            os.killpg(self.process, signal.SIGKILL)
        self.wait()


def start(log: Path, arguments: list[str]) -> Child:
    sys.stdout.flush()
    said = log.with_suffix(".said")
    process = os.fork()
    if process == 0:
        _run(log, arguments, said)
    return Child(process, said)


def _run(log: Path, arguments: list[str], said: Path) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, file in enumerate((nothing, nothing, os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))):
            os.dup2(file, number)
        _log_fsync(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        sys.argv = ["palimpsest", *arguments]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:  # noqa: BLE001 -- as at the end of a process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # without what the parent's blocks do when they end


def _log_fsync(log: int) -> None:
    fsync = os.fsync

    def logged(file: int) -> None:
        fsync(file)
        about = os.fstat(file if isinstance(file, int) else file.fileno())
        os.write(log, f"{about.st_dev} {about.st_ino} {about.st_size}\n".encode())

    os.fsync = logged
