"""Training on Hugging Face Accelerate (extra `train`): data sets and whole runs."""

from typing import TYPE_CHECKING

from convinit._lazy import lazy_names

if TYPE_CHECKING:
    from convinit.train._public import *  # noqa: F403
else:
    __getattr__, __dir__ = lazy_names(__name__)
