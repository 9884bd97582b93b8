"""Random draws that depend on nothing but their key: the same on every machine, release and process."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def derived_seed(*key: str | int) -> int:
    """A seed of 64 bits for what `key` names, such as ("augment", seed, epoch, index).

    A hash, so that neighbouring keys have unrelated seeds.
    """
    return int.from_bytes(blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "little")


def permutation(n: int, *key: str | int) -> np.ndarray:
    """0 … n − 1 in the random order of `key`, [n] int64.

    Sorts raw words of Philox, whose stream NumPy guarantees; `torch.randperm` and NumPy's own `permutation`
    may change from release to release.
    """
    return np.random.Philox(key=derived_seed(*key)).random_raw(n).argsort(kind="stable")
