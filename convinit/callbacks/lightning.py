"""`DriftCallback` for the Trainer of Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from convinit.adapters import InitReport
from convinit.callbacks._records import count_from, keep_report, metrics
from convinit.drift import DriftMonitor


class DriftCallback(Callback):
    """Records where the heads look while a Trainer trains, and logs it to the Trainer's loggers.

    report = convinit.init_vit_(module.model)
    trainer = Trainer(callbacks=[callback := DriftCallback(report)])
    trainer.fit(module, loader)
    viz.drift(callback.monitor.history).savefig("drift.png")

    The means over all heads, ``drift/peak``, ``drift/hit_rate`` and ``drift/distance``, go to the loggers.
    The report goes to init_report.json in ``trainer.log_dir``, and to Python's logging at level INFO.
    Checkpoints keep the records.

    Args:
        report: of :func:`convinit.init_vit_` on the model, before training.
        every: optimiser steps between two records; the start and the end are recorded, too.

    Attributes:
        monitor: the :class:`convinit.DriftMonitor`, with every head's metrics.

    Raises:
        TypeError, ValueError: as `DriftMonitor`.
    """

    def __init__(self, report: InitReport, *, every: int = 100) -> None:
        self.monitor = DriftMonitor(report, every=every)
        self._report = report
        self._step = 0  # the Trainer's, which does not move with every batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            folder = trainer.log_dir  # asked for by every process
            keep_report(self._report, folder if trainer.is_global_zero else None)
            self._log(trainer)
        elif self._step != trainer.global_step:
            count_from(self.monitor, trainer.global_step)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are accumulated
            return
        self._step = trainer.global_step
        if self.monitor.step():
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor.record():
            self._log(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor.state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict["monitor"])
        self._step = state_dict["step"]

    def _log(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics(self.monitor), step=trainer.global_step)
