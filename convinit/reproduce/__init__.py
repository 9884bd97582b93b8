"""`convinit reproduce`: the papers' experiments as grids of training runs (extra `train`).

tables → grid → cells: what is varied, which runs that makes, one run. readings → report → page: what is read
off the runs, how it is told, and the files. What others reported is in docs/published.md.
"""

from typing import TYPE_CHECKING

from convinit._lazy import lazy_names

if TYPE_CHECKING:
    from convinit.reproduce._public import *  # noqa: F403
else:
    __getattr__, __dir__ = lazy_names(__name__)
