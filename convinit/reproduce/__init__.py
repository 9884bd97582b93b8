"""`convinit reproduce`: the papers' experiments as grids of training runs (extra `train`).

tables → grid → cells: what is varied, which runs that makes, one run. readings → report → page: what is read
off the runs, how it is told, and the files. What others reported is in docs/published.md.
"""

from convinit.reproduce.cells import run_cell
from convinit.reproduce.grid import Grid, run_all, unfinished
from convinit.reproduce.page import write_report
from convinit.reproduce.report import Report
from convinit.reproduce.tables import DATA, TABLES, Choice, Table, declared, tables_of

__all__ = [
    "DATA",
    "TABLES",
    "Choice",
    "Grid",
    "Report",
    "Table",
    "declared",
    "tables_of",
    "run_all",
    "run_cell",
    "unfinished",
    "write_report",
]
