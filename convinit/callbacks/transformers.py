"""`DriftCallback` for the Trainer of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from convinit.adapters import InitReport
from convinit.callbacks._records import count_from, keep_report, metrics
from convinit.drift import DriftMonitor

_STATE = "drift.pt"  # in each checkpoint


class DriftCallback(TrainerCallback):
    """Records where the heads look while a Trainer trains, and logs it as the Trainer logs its loss.

    report = convinit.init_vit_(model)
    trainer = Trainer(model, args, train_dataset=...)
    trainer.add_callback(callback := DriftCallback(trainer, report))
    trainer.train()
    viz.drift(callback.monitor.history).savefig("drift.png")

    The means over all heads, ``drift/peak``, ``drift/hit_rate`` and ``drift/distance``, go to
    ``trainer.state.log_history`` and to whatever ``report_to`` names. The report goes to init_report.json in
    the output folder, and to Python's logging at level INFO. A checkpoint keeps the records in drift.pt; a
    run that is resumed from one in the output folder goes on with them.

    Args:
        trainer: whose training is watched.
        report: of :func:`convinit.init_vit_` on its model, before training.
        every: optimiser steps between two records; the start and the end are recorded, too.

    Attributes:
        monitor: the :class:`convinit.DriftMonitor`, with every head's metrics.

    Raises:
        TypeError, ValueError: as `DriftMonitor`.
    """

    def __init__(self, trainer: Trainer, report: InitReport, *, every: int = 100) -> None:
        self.monitor = DriftMonitor(report, every=every)
        self._trainer, self._report = trainer, report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            keep_report(self._report, args.output_dir if state.is_world_process_zero else None)
            self._log(control)
            return
        saved = _checkpoint(args, state) / _STATE
        if saved.exists():
            self.monitor.load_state_dict(torch.load(saved, weights_only=True))
        else:
            count_from(self.monitor, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.monitor.step():
            self._log(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            torch.save(self.monitor.state_dict(), _checkpoint(args, state) / _STATE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.monitor.record():
            self._log(control)

    def _log(self, control: TrainerControl) -> None:
        wanted = control.should_log
        self._trainer.log(metrics(self.monitor))
        control.should_log = wanted  # logging ends the wish to, but the loss of this step is still to come


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
