"""The demo's table, and what it says: every sentence is made from the figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convinit._over_seeds import Figure, clearly, compare, over_seeds
from convinit.demo.arms import ARMS, OURS
from convinit.demo.runs import SHIFTS, Run

GOAL = 0.9  # test accuracy; the table counts the epochs to it


@dataclass(frozen=True)
class Row:
    """One arm of the table; accuracies in %.

    Attributes:
        arm: key of `ARMS`.
        early: after `early_epoch(epochs)` epochs.
        end: after the last one.
        shifted: at the end, on test images shifted by one pixel, mean of four directions.
        epochs_to_goal: first epoch whose test accuracy is at least 90 %, over the seeds that got there; None
            if none did.
        reached: how many seeds did.
        parameters: of the model.
        peak_start, peak_trained: mean attention on the impulse before and after training, in %.
    """

    arm: str
    early: Figure
    end: Figure
    shifted: Figure
    epochs_to_goal: Figure | None
    reached: int
    parameters: int
    peak_start: Figure | None
    peak_trained: Figure | None


def early_epoch(epochs: int) -> int:
    """The epoch of the column "early": half way, when speed of learning shows."""
    return max(1, epochs // 2)


def summarize(runs: Sequence[Run]) -> list[Row]:
    """One row an arm, in the order of the runs; all must have the same number of epochs."""
    rows = []
    for arm in dict.fromkeys(run["identity"]["arm"] for run in runs):
        own = [run for run in runs if run["identity"]["arm"] == arm]
        curves = [[record["accuracy"] for record in run["curve"]] for run in own]
        early = early_epoch(len(curves[0]))
        firsts = [next((i for i, value in enumerate(curve, 1) if value >= GOAL), None) for curve in curves]
        reached = [float(first) for first in firsts if first is not None]
        has_peak = own[0]["peak"]["start"] is not None
        rows.append(
            Row(
                arm=arm,
                early=over_seeds([100 * curve[early - 1] for curve in curves]),
                end=over_seeds([100 * run["accuracy"] for run in own]),
                shifted=over_seeds([100 * statistics.fmean(run["shifted"].values()) for run in own]),
                epochs_to_goal=over_seeds(reached) if reached else None,
                reached=len(reached),
                parameters=own[0]["parameters"],
                peak_start=over_seeds([100 * run["peak"]["start"] for run in own]) if has_peak else None,
                peak_trained=over_seeds([100 * run["peak"]["trained"] for run in own]) if has_peak else None,
            )
        )
    return rows


def columns(epochs: int) -> list[str]:
    return [
        "initial weights",
        f"{_count(early_epoch(epochs), 'epoch')}, %",
        f"{_count(epochs, 'epoch')}, %",
        "shifted, %",
        f"to {GOAL:.0%}",
    ]


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `columns`."""
    if row.epochs_to_goal is None:
        to_goal = "not reached"
    else:
        missing = row.end.n - row.reached
        to_goal = str(row.epochs_to_goal) + (f" ({row.reached} of {row.end.n})" if missing else "")
    return [ARMS[row.arm].label, str(row.early), str(row.end), str(row.shifted), to_goal]


def markdown(rows: Sequence[Row], epochs: int, text: Sequence[str]) -> str:
    lines = [columns(epochs), ["---"] * len(columns(epochs)), *(cells(row) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {sentence}" for sentence in text) + "\n"


def setting(runs: Sequence[Run]) -> str:
    """What was done, in a sentence or two."""
    settings = runs[0]["identity"]["settings"]
    seeds = len({run["identity"]["seed"] for run in runs})
    images, others = _count(settings["num_train"], "training image"), runs[0]["test_images"]
    return " ".join(
        [
            f"scikit-learn's digits, 8×8 pixels, one token a pixel: {images}, {others:,} others to test on,",
            "the same split for all.",
            _count(seeds, "seed") + (" (mean ± standard deviation)," if seeds > 1 else ","),
            f"{_count(settings['epochs'], 'epoch')} of AdamW at {settings['lr']:g} in batches of",
            f"{settings['batch_size']}. “+ V·proj”: values and output layer start mimetic too, else as",
            "nn.Linear does. Controls: heads fitted to random permutations, or random heads, at the weight",
            f"norm of ours. Shifted: the test images moved by one pixel ({', '.join(SHIFTS)}), zeros",
            "coming in, mean of the four; no network was trained on shifted images. The last column counts",
            f"the epochs to {GOAL:.0%} of unshifted test images.",
        ]
    )


def conclusions(rows: Sequence[Row], epochs: int) -> list[str]:
    """What the table shows and what it does not.

    Two means differ "clearly" if they are apart by more than twice the standard error of the difference.
    """
    by_arm = {row.arm: row for row in rows}
    ours = by_arm.get(OURS)
    text = []
    if ours is not None:
        early = f"after {_count(early_epoch(epochs), 'epoch')}"
        name = ARMS[OURS].label
        for others, what in (
            (("default", "mimetic-vo"), "Speed of learning"),
            (("scrambled-vo", "random-vo"), "Speed of learning against the controls"),
        ):
            found = [compare(ours.early, by_arm[o].early, ARMS[o].label) for o in others if o in by_arm]
            if found:
                text.append(f"{what}: {early}, {name} is {_join(found)}.")
        alone = by_arm.get("impulse")
        if alone is not None and "default" in by_arm:
            found = [compare(alone.early, by_arm["default"].early, ARMS["default"].label)]
            text.append(f"Queries and keys alone, {early}: {ARMS['impulse'].label} is {_join(found)}.")
        found = [
            compare(ours.end, by_arm[o].end, ARMS[o].label)
            for o in ("default", "mimetic-vo", "scrambled-vo", "random-vo")
            if o in by_arm
        ]
        if found:
            text.append(f"At the end: {name} is {_join(found)}.")
        controls = [o for o in ("scrambled-vo", "random-vo") if o in by_arm]
        if controls:
            found = [compare(ours.shifted, by_arm[o].shifted, ARMS[o].label) for o in controls]
            text.append(
                f"Shifted images: {name} is {_join(found)}. {_what_controls_say(ours, by_arm, controls)}"
            )
        if ours.peak_start is not None and ours.peak_trained is not None:
            left = ours.peak_start.mean - ours.peak_trained.mean > 5
            verb = "left" if left else "kept"
            text.append(
                f"The prior is {verb} as the network learns: heads of {name} start with {ours.peak_start} % "
                f"of their attention on the impulse and end with {ours.peak_trained} %."
            )
    if "convmixer" in by_arm and len(rows) > 1:
        sizes = [by_arm["convmixer"].parameters, next(r for r in rows if r.arm != "convmixer").parameters]
        text.append(
            f"ConvMixer is another network ({sizes[0]:,} parameters against {sizes[1]:,}): a landmark, not a "
            "competitor."
        )
    text.append(
        f"Not shown: anything about larger images, other data or longer training. This is one small set and "
        f"{_count(max(row.end.n for row in rows), 'seed')}; the fit's default peak, alpha, the scale "
        "of the pixels and the epochs were chosen on these very images, the learning rate was tuned for no "
        "arm. "
        + (
            "“Clearly” means more than two standard errors, a hint rather than a proof at so few seeds."
            if min(row.end.n for row in rows) > 1
            else "With a single seed no difference can be called clear: run more (--seeds)."
        )
    )
    return text


def _what_controls_say(ours: Row, by_arm: dict[str, Row], controls: Sequence[str]) -> str:
    """Whether the convolution itself is seen to help: only if it beats every control."""

    def beaten(name: str) -> list[bool | None]:
        return [clearly(getattr(ours, name), getattr(by_arm[o], name)) for o in controls]

    verdicts = {"early": beaten("early"), "shifted": beaten("shifted")}
    if any(verdict is None for found in verdicts.values() for verdict in found):
        return "Whether the convolution itself matters, one seed cannot say."
    flatter = (
        "The controls share the weight norm, not the sharpness: scrambled targets are harder to fit, so "
        "their maps start flatter, and that may be part of it."
    )
    shifted = all(verdicts["shifted"])
    early = all(verdicts["early"])
    if shifted and early:
        return f"So convolutional maps are seen to help, with speed and with shifts. {flatter}"
    if shifted:
        return (
            "So convolutional maps are seen to help with shifts; the speed of learning they share with a "
            f"control, and is not shown to come from the convolution. {flatter}"
        )
    if early:
        return (
            f"So convolutional maps are seen to help with speed, and not shown to help with shifts. {flatter}"
        )
    return "So what it gains here is not shown to come from the convolution itself."


def _join(parts: Sequence[str]) -> str:
    return "; ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(row) for row in rows]
