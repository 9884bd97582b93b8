"""The models that `convinit.adapters.timm.register` adds: timm wants a module that holds them."""

from __future__ import annotations

from typing import Any

__all__: list[str] = []  # timm appends their names
default_cfgs: dict[str, Any] = {}  # timm's data settings of each: input size, mean, crop, ...
