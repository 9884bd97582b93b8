"""What is read off a finished run, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Outcome = Mapping[str, Any]  # what `convinit.reproduce.cells.run_cell` returns

_TITLES = {
    "accuracy": "test accuracy, %",
    "validation": "accuracy on held-out training images, %",
    "shifted-1": "shifted by one pixel, %",
    "shifted-2": "shifted by two pixels, %",
    "shifted-4": "shifted by four pixels, %",
    "start-peak": "attention on the impulse at the start, %",
    "trained-peak": "attention on the impulse after training, %",
}


def title(reading: str, epochs: int) -> str:
    """What a reading is, with its unit.

    Args:
        reading: "accuracy", on test images; "validation", its like on validation images; "shifted-1",
            "shifted-2" and "shifted-4", means over four directions; "part-X", the accuracy after the share X
            of all epochs; "epochs-to-X", the first epoch with an accuracy of X %; "start-peak" and
            "trained-peak". With validation images "part" and "epochs-to" are theirs.
        epochs: of the runs.
    """
    if reading.startswith("part-"):
        after = _epoch(reading, epochs)
        return f"after {after} epoch{'s' * (after != 1)}, %"
    if reading.startswith("epochs-to-"):
        return f"epochs to {reading.removeprefix('epochs-to-')} %"
    return _TITLES[reading]


def value(reading: str, outcome: Outcome) -> float | None:
    """A reading of a run, in % or epochs; None where the run does not have it, or failed."""
    if "failed" in outcome:
        return None
    if reading in ("accuracy", "validation"):
        return 100 * outcome[reading]
    if reading.startswith("part-"):
        accuracies = {epoch: accuracy for epoch, accuracy in outcome["curve"]}
        share = accuracies.get(_epoch(reading, outcome["epochs"]))
        return None if share is None else 100 * share
    if reading.startswith("epochs-to-"):
        wanted = float(reading.removeprefix("epochs-to-")) / 100
        return next((float(epoch) for epoch, accuracy in outcome["curve"] if accuracy >= wanted), None)
    if reading.startswith("shifted-"):
        shares = outcome["shifted"][reading.removeprefix("shifted-")]
        return 100 * sum(shares.values()) / len(shares)
    share = outcome["peak"][reading.removesuffix("-peak")]
    return None if share is None else 100 * share


def _epoch(reading: str, epochs: int) -> int:
    return max(1, round(float(reading.removeprefix("part-")) * epochs))
