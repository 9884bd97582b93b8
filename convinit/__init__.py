"""Convolutional initialization for Vision Transformers (arXiv 2401.12511).

`import convinit` leaves torch alone until a public name is used, so that `convinit --help` answers at once.
Where torch is imported already, the names come at once, and with them torch.ops.convinit.
"""

import sys
from typing import TYPE_CHECKING

from convinit._lazy import lazy_names
from convinit._version import __version__ as __version__

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__)
if TYPE_CHECKING or "torch" in sys.modules:
    from convinit._public import *  # noqa: F403
