"""Figures that others reported, and the cells of ours that they belong beside.

Reported, not measured here. A figure is shown only beside the very cell that it is declared for, with none of
its settings changed; what is known to differ even then is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convinit.reproduce.cells import identity
from convinit.reproduce.tables import declared
from convinit.train.config import Config


@dataclass(frozen=True)
class Reported:
    """A figure.

    Attributes:
        data, table, row, column, reading: where it belongs.
        value: in %.
        source: who reported it.
        settings: "section.key" → value that all cells must be given.
        differs: what is known to differ, or not known.
    """

    data: str
    table: str
    row: str
    column: str
    reading: str
    value: float
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""


_NOTEBOOK = "authors' notebook, repository impulse_init"
_REVIEWS = "reviews quoting arXiv 2404.01139"
_COURSE = "independent reproduction with the code of arXiv 2505.19985, a course project"
_OWN_FIT = "the papers' own fit; fp16; crops at full size; one run"
_UNKNOWN = "the papers' own fit, P not enlarged, values perhaps not mimetic; recipe and epochs not known"
_BY_COURSE = "epochs and batch size not known; recipe, patch and image size not known"
_KERNEL_3 = {"init.kernel_size": 3}

_OURS_3, _OURS_5 = "impulse f = 3, P × 60", "impulse f = 5, P × 60"
_PAPERS = "impulse f = 3, fit of 2505.19985, P × 18"


def _course(data: str, column: str, default: float, mimetic: float, impulse: float) -> list[Reported]:
    rows = {"default": default, "mimetic": mimetic, _PAPERS: impulse}
    return [
        Reported(data, "timm", row, column, "accuracy", value, _COURSE, differs=_BY_COURSE)
        for row, value in rows.items()
    ]


REPORTED = [
    Reported(
        "cifar10", "convergence", "impulse", "Model I", "part-1.0", 86.65, _NOTEBOOK, differs=_OWN_FIT
    ),
    Reported(
        "cifar10", "convergence", "impulse", "Model I", "part-0.7", 85.15, _NOTEBOOK, differs=_OWN_FIT
    ),
    Reported(
        "cifar10", "convergence", "mimetic", "Model I", "part-0.7", 83.50, _NOTEBOOK,
        differs="fp16; crops at full size; one run",
    ),
    Reported(
        "cifar10", "convmixer", "impulse", "frozen", "accuracy", 92.20, _REVIEWS, _KERNEL_3,
        "“impulse-like” filters; recipe not known",
    ),
    Reported(
        "cifar10", "convmixer", "control: random", "trained", "accuracy", 92.82, _REVIEWS, _KERNEL_3,
        "recipe not known",
    ),
    *_course("cifar10", "all images", 89.12, 91.99, 92.47),
    *_course("cifar100", "all images", 67.95, 72.67, 73.40),
    *_course("cifar10", "10 %", 49.24, 55.59, 57.30),
    *(
        Reported(data, "timm", row, "all images", "accuracy", value, _REVIEWS, differs=_UNKNOWN)
        for data, row, value in (
            ("cifar10", _OURS_3, 91.62),
            ("cifar10", "mimetic", 91.16),
            ("cifar100", _OURS_5, 70.46),
            ("cifar100", "mimetic", 70.40),
            ("svhn", "mimetic", 97.53),
            ("svhn", _OURS_3, 97.21),
            ("svhn", _OURS_5, 97.23),
        )
    ),
]  # fmt: skip


def reported(data: str, table: str, row: str, column: str, reading: str, config: Config) -> list[Reported]:
    """The figures that belong beside a reading of a cell whose run is `config`."""
    place = (data, table, row, column, reading)
    found = [
        each for each in REPORTED if (each.data, each.table, each.row, each.column, each.reading) == place
    ]
    return [each for each in found if identity(config) == identity(_declared(each, config.run.seed))]


def _declared(figure: Reported, seed: int) -> Config:
    """The run that a figure belongs beside."""
    table = declared(figure.table, figure.data)
    for row, column in table.cells():
        if (row.label, column.label) == (figure.row, figure.column):
            return table.config(row, column, seed, figure.settings)
    raise AssertionError(figure)
