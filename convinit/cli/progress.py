"""The bars of the command line: tqdm's, on standard error, where that is a terminal."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def bar(total: int, description: str, unit: str, *, digits: int = 0, **options: Any) -> Any:
    """A bar with done and all, in units, and the time left.

    Args:
        total: of all units.
        description: what is being done.
        unit: its name.
        digits: behind the point, where steps are parts of a unit.
        options: of ``tqdm``.
    """
    done = f"{{n:,.{digits}f}}/{{total:,}} {unit}"
    form = f"{{desc}}: {{bar}} {done}, {{elapsed}}, left: {{remaining}}{{postfix}}"
    return tqdm(total=total, desc=description, leave=False, bar_format=form, **{"disable": None, **options})
