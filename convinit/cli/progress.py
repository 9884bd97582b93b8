"""The bars of the command line: tqdm's, on standard error, where that is a terminal."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def bar(total: int, description: str, unit: str, **options: Any) -> Any:
    """A bar with done and all, in units, and the time left; steps may be parts of a unit.

    Args:
        total: of all units.
        description: what is being done.
        unit: its name.
        options: of ``tqdm``.
    """
    form = f"{{desc}}: {{bar}} {{n:.4g}}/{{total}} {unit}, {{elapsed}}, left: {{remaining}}{{postfix}}"
    return tqdm(total=total, desc=description, leave=False, bar_format=form, **{"disable": None, **options})
