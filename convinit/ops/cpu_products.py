"""Detects CPUs on which PyTorch's matrix products run at half speed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["MKL_USES_HALF_VECTORS", "float32_is_exact"]


def _mkl_uses_half_vectors() -> bool:
    """Whether this CPU multiplies vectors of 512 bits at once of which MKL uses 256.

    MKL does so on AMD's CPUs. Of these Zen 5, family 26, multiplies so, in servers and desktops; older ones
    and Zen 5 in laptops have the instructions but execute them in two halves. (A laptop is taken for a
    desktop here; nobody has measured one.) PyTorch multiplies float32 by MKL, and convolves by oneDNN, which
    uses all 512.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = ""
    if cpuinfo.exists():
        with cpuinfo.open() as lines:
            text = lines.read(2048)  # the first CPU of what may be hundreds
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", text, re.MULTILINE)
    return (
        family is not None
        and int(family[1]) >= 26
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


# Asked once, for torch.compile does not trace through the questions.
MKL_USES_HALF_VECTORS = _mkl_uses_half_vectors()


def float32_is_exact() -> bool:
    """Whether float32 products are to be float32 throughout, and oneDNN may make them.

    torch.compile cannot trace the questions; its graphs take the answer to be yes.
    """
    if torch.compiler.is_compiling():
        return True
    onednn: Any = torch.backends.mkldnn
    precisions = (onednn.matmul.fp32_precision, onednn.conv.fp32_precision)
    return bool(onednn.enabled) and all(precision in ("none", "ieee") for precision in precisions)
