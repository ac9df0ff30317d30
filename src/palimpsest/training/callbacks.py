"""What happens between the Trainer's steps: complete checkpoints, progress, the last evaluation. Loggers, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from palimpsest.files import UserError, sync
from palimpsest.parallel import is_main, wait_for_all

COMPLETE = "complete"  # empty file the Trainer's checkpoint gets when all of it is on the disk


class LastStepAndCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint when all of it is on the disk. The finished model is written by the caller, not here.

    The Trainer evaluates every `eval_steps`; the last step is always worth a measurement.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False
            control.should_evaluate = args.eval_strategy != "no"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_all()  # each rank has written its random state
        if is_main():
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class EpochReachesBatches(TrainerCallback):  # type: ignore[misc]
    """Before an epoch is begun, or gone on with after a kill, its batches are drawn: `set_epoch(epoch, from 0)`.

    The Trainer's own call does not reach them in every version, above all not where it skips those that were seen.
    """

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.set_epoch(int(state.epoch or 0))  # epochs done, with the part of the one that is gone on with


def mark_complete(checkpoint: Path) -> None:
    """Put the marker into a checkpoint once all of it is on the disk: no power cut leaves it beside empty files."""
    inside = sorted(checkpoint.rglob("*"))
    for path in (*inside, checkpoint, checkpoint.parent):
        sync(path)
    marker = checkpoint / COMPLETE
    marker.touch()
    sync(marker)
    sync(checkpoint)


class ReportProgress(TrainerCallback):  # type: ignore[misc]
    """`advance(steps done)` after every step."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)


def require_loggers(report_to: Sequence[str]) -> None:
    """Raise UserError for a name of `report_to` that transformers does not know or whose package is not installed."""
    if not report_to:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"training.report_to names {name!r}, which transformers does not know; "
                f"use some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        if name not in get_available_reporting_integrations():
            raise UserError(
                f"training.report_to names {name!r}, but its package is not installed; install it or take the name out."
            )
