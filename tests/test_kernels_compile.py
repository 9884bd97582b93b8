"""At its committed configurations every kernel compiles for every GPU generation, without spills, in bounds.

Needs Triton, but no GPU. The default choice is what the paper's shape and its neighbours use; all entries of
the table take some minutes (pytest -m slow).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from convinit.kernels import configs, report  # noqa: E402

ENTRIES = list(report.entries())
FAST = [
    (generation, key, config, precision)
    for generation, key, config, precision in ENTRIES
    if (key.itemsize, key.rank, precision) == (2, 64, "ieee")
    and key.tokens in (256, None)
    and not key.kernel.endswith("dropout")
]


def name(entry):
    generation, key, _, precision = entry
    return f"sm{generation}-{key.kernel}-{8 * key.itemsize}bit-{precision}-r{key.rank}-N{key.tokens or 'any'}"


def check(generation, key, config, precision):
    usage = report.usage(generation, key, config, precision)
    assert usage.stack == 0, f"{config} spills: {usage}"
    assert usage.shared <= configs.SHARED_MEMORY[generation], f"{config} does not fit: {usage}"
    assert usage.registers * 32 * config.num_warps <= 65536


@pytest.mark.parametrize("entry", FAST, ids=name)
def test_resources(entry):
    check(*entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in FAST], ids=name)
def test_resources_of_all_entries(entry):
    check(*entry)


def test_report_sees_spills():
    """The check above can fail: a tile that no GPU's registers hold."""
    key = configs.Key("backward", 2, 64, 256)
    assert report.usage(90, key, configs.Config(64, 256, 4, 1)).stack > 0


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("generation", configs.GENERATIONS)
def test_every_problem_has_a_configuration(kernel, itemsize, generation):
    for tokens in (1, 17, 64, 65, 196, 256, 257, 1024, configs.MAX_TOKENS):
        for rank in (1, 16, 32, 48, 64, 80, 96, 128):
            assert configs.lookup(kernel, generation, itemsize, tokens, rank).num_warps in (4, 8)
    with pytest.raises(ValueError, match="r = 129"):
        configs.lookup(kernel, generation, itemsize, 64, 129)
