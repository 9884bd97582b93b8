"""Public names of a package that are imported when the first of them is used (PEP 562)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names stand in the `__all__` of its `_public`.

    `import package` is then cheap: `_public`, with torch behind it, is imported when a name of it is used.
    Submodules are attributes of the package too, imported when they are used.
    """

    def load() -> None:
        public = importlib.import_module(f"{package}._public")
        names = {name: getattr(public, name) for name in public.__all__}
        vars(sys.modules[package]).update(names, __all__=public.__all__)

    def get(name: str) -> Any:
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        if name == "__all__" or not name.startswith("_"):
            load()
            if name in vars(sys.modules[package]):
                return vars(sys.modules[package])[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        load()
        return sorted(vars(sys.modules[package]))

    return get, names
