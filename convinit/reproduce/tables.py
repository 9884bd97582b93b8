"""The tables that there are, by data set and name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from convinit._words import near
from convinit.reproduce import fashion_mnist, papers
from convinit.reproduce.architectures import architectures
from convinit.reproduce.demo import demo
from convinit.reproduce.libraries import libraries
from convinit.reproduce.sweep import sweep
from convinit.reproduce.table import Table

DATA = ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet")


def tables_of(data: str) -> Mapping[str, Callable[[str], Table]]:
    """The tables that there are for a data set, by name."""
    if data == "fashion-mnist":
        return {**fashion_mnist.TABLES, "libraries": libraries, "sweep": sweep}
    tables = {**papers.TABLES, "architectures": architectures}
    return {"demo": demo, **tables, "libraries": libraries, "sweep": sweep} if data == "digits" else tables


def data_of(name: str) -> tuple[str, ...]:
    """The data sets that there is a table of that name for."""
    return tuple(each for each in DATA if name in tables_of(each))


def declared(name: str, data: str = "digits") -> Table:
    """A table for a data set: small ones for the digits and Fashion-MNIST, else the papers' size.

    Raises:
        ValueError: there is no such table or data set.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}{near(data, DATA)}")
    tables = tables_of(data)
    if name not in tables and (others := data_of(name)):
        raise ValueError(
            f"data must be {' or '.join(others)} for table {name!r}, got {data!r}: convinit reproduce {name} "
            f"--data {others[0]}"
        )
    if name not in tables:
        known = dict.fromkeys(each for other in DATA for each in tables_of(other))
        raise ValueError(f"table must be one of {', '.join(known)}, got {name!r}{near(name, known)}")
    table = tables[name](data)
    own: dict[str, Any] = {} if data == "digits" else {"data.name": data}
    if data == "tiny-imagenet":
        own["model.patch_size"] = 4  # of 64 pixels
    of_papers = any(row.settings == papers.IMPULSE_PAPER.settings for row in table.rows)
    parts = (
        table.note,
        _DEFAULT if papers.ALL_DEFAULT in table.rows else "",
        _AS_IN_THE_PAPER if of_papers else "",
        _SMALL if of_papers and data == "digits" else "",
    )
    note = " ".join(part for part in parts if part)
    return replace(table, settings={**table.settings, **own}, note=note)


_DEFAULT = "“Default, values too”: queries, keys, values and output layer are as nn.Linear draws them."
_AS_IN_THE_PAPER = (
    "As in the paper (arXiv 2401.12511): impulses by 10,000 steps of Adam at σ = 0.1, fitted to P whatever α "
    "is; mimetic noise uniform, of a third of the variance; values and output layer as nn.Linear makes them. "
    "Its random weights are those of nn.Linear."
)
_SMALL = (
    "At the size of these networks that fit hardly makes maps (peak 0.03, uniform attention having 0.016); "
    "at the paper's size it does (0.32)."
)
