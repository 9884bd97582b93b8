"""The table of `convinit demo`: what a newcomer needs of the table "shift", with curves and heads."""

from __future__ import annotations

from dataclasses import replace

from convinit.reproduce.papers import TABLES
from convinit.reproduce.table import Choice, Table

QUICK = ("default, values too", "mimetic", "impulse", "control: scrambled")  # rows of `convinit demo --quick`
_OTHERS = ("control: norm-matched", "ConvMixer, frozen impulses")


def demo(data: str) -> Table:
    """Seven rows on the digits, and a column for each thing that is read off."""
    shift = TABLES["shift"](data)
    rows = {row.label: row for row in shift.rows}
    queries_keys = Choice("impulse, default values", {"init.method": "impulse", "init.values": "default"})
    return replace(
        shift,
        name="demo",
        title="A small ViT learns to read digits, from different initial weights",
        question="What do initial weights do to a small ViT on few images?",
        rows=(*(rows[label] for label in QUICK), queries_keys, *(rows[label] for label in _OTHERS)),
        readings=("part-0.5", "accuracy", "shifted-1", "epochs-to-90"),
        figure="curves",
        heads=True,
        note="“Default values”: values and output layer nn.Linear's, with impulses as queries and keys. "
        "Scrambled: heads fitted to random permutations. Norm-matched: random heads of the impulses' weight "
        "norm. No network was trained on shifted images. The ConvMixer is another network: a landmark.",
    )
