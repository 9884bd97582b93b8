from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Workers side by side (pytest -n) share the CPUs; what they start inherits it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What convinit keeps between runs is neither read from the user's folder nor left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVINIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with the same seed for every test."""
    return torch.Generator().manual_seed(0)
