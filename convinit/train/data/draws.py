"""Random draws that depend on nothing but their key: the same on every machine, release and process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import torch


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


@contextlib.contextmanager
def seeded(*key: str | int) -> Iterator[None]:
    """Lets torch's CPU generator, Python's and NumPy's draw as of `key`; afterwards they are as before."""
    # Not torch.manual_seed, which would seed the accelerators' generators too and take 40 times as long.
    generator = torch.default_generator
    states = generator.get_state(), random.getstate(), np.random.get_state()
    seed = derived_seed(*key)
    generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
