"""What the callbacks of all libraries do alike."""

from __future__ import annotations

import logging
from pathlib import Path

from convinit.adapters import InitReport
from convinit.drift import MEASURES, DriftMonitor

_logger = logging.getLogger(__name__)


def keep_report(report: InitReport, folder: str | Path | None) -> None:
    """Logs the report at level INFO and writes it to init_report.json of the folder, if there is one."""
    _logger.info("%s", report)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "init_report.json").write_text(report.to_json(), encoding="utf-8")


def metrics(monitor: DriftMonitor) -> dict[str, float]:
    """ "drift/peak" and so on of the last record, mean over all heads; what no head has is left out."""
    history = monitor.history
    means = {f"drift/{name}": getattr(history, name)[-1].nanmean().item() for name in MEASURES}
    return {name: mean for name, mean in means.items() if mean == mean}


def count_from(monitor: DriftMonitor, step: int) -> None:
    """Lets a monitor that was not restored go on at the step at which its run does."""
    monitor.load_state_dict({**monitor.state_dict(), "step": step})
