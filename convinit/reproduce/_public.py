"""The public names of convinit.reproduce, all at once."""

from convinit.reproduce.cells import run_cell
from convinit.reproduce.grid import Grid, run_all, unfinished
from convinit.reproduce.page import write_report
from convinit.reproduce.papers import TABLES
from convinit.reproduce.report import Report
from convinit.reproduce.table import Choice, Table
from convinit.reproduce.tables import DATA, declared, tables_of

__all__ = [
    "DATA",
    "TABLES",
    "Choice",
    "Grid",
    "Report",
    "Table",
    "declared",
    "run_all",
    "run_cell",
    "tables_of",
    "unfinished",
    "write_report",
]
