"""Machine code of the kernels for every GPU generation: in bounds, on tensor cores, no spills in loops.

Needs Triton, but no GPU. The default choice is what the paper's shape and its neighbours use; all entries of
the table take some minutes (pytest -m slow).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from convinit.kernels import configs, launch, resources  # noqa: E402
from convinit.kernels.configs import Config, Key  # noqa: E402

ENTRIES = list(resources.entries())
FAST = [
    (generation, key, config, precision)
    for generation, key, config, precision in ENTRIES
    if (key.itemsize, key.rank) == (2, 64) and key.tokens in (256, None)
]
SHARED_MEMORY = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}  # of a multiprocessor


def name(entry):
    generation, key, _, precision = entry
    return f"sm{generation}-{key.kernel}-{8 * key.itemsize}bit-{precision}-r{key.rank}-N{key.tokens or 'any'}"


def fitting(generation, config, usage):
    """Programs that fit a multiprocessor at once."""
    registers = -(-usage.registers // 8) * 8 * 32 * config.num_warps
    places = [
        65536 // registers,
        SHARED_MEMORY[generation] // (usage.shared + 1024),
        (48 if generation == 120 else 64) // config.num_warps,
    ]
    return min(places + ([512 // usage.tensor_memory] if usage.tensor_memory else []))


def check(generation, key, config, precision):
    usage = resources.usage(generation, key, config, precision)
    assert usage.shared <= configs.SHARED_MEMORY[generation], f"{config} does not fit: {usage}"
    assert usage.tensor_memory <= 512
    assert usage.loop["LDL"] + usage.loop["STL"] <= ALLOWED_LOCAL.get((generation, key), 0), usage
    assert any(usage.loop[op] for op in resources.TENSOR_CORES), f"no tensor cores: {dict(usage.loop)}"
    if key.kernel in ("apply", "map_gradient"):  # whose images are dealt out over config.programs
        assert config.programs <= fitting(generation, config, usage), usage
    if generation == 90 and key.itemsize == 2 and key.rank >= 64:  # dQᵀ has r rows, and wgmma wants 64
        assert usage.loop["HGMMA"] and not usage.loop["HMMA"], f"not Hopper's products: {dict(usage.loop)}"


# Spills in hot loops: of what measured fastest all the same (the first), or the fewest.
ALLOWED_LOCAL = {
    (90, Key("backward", 2, 64, 128)): 40,
    (90, Key("backward_queries", 4, 128, None)): 10,
    (100, Key("backward_keys", 4, 128, None)): 2,
}


@pytest.mark.parametrize("entry", FAST, ids=name)
def test_machine_code(entry):
    check(*entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in FAST], ids=name)
def test_machine_code_of_all_entries(entry):
    check(*entry)


def test_report_sees_spills():
    """The check above can fail: a tile that no GPU's registers hold."""
    usage = resources.usage(90, Key("backward", 2, 64, 256), Config(64, 256, 4, 2))
    assert usage.stack > 0 and usage.loop["LDL"] > 0


# Instructions of a thread for each (query, key) of the hot loop, with Triton 3.8.
INSTRUCTIONS = {
    Key("forward", 2, 64, 256): 8.2,
    Key("backward", 2, 64, 256): 14.8,
    Key("backward_queries", 2, 64, None): 15.8,
    Key("backward_keys", 2, 64, None): 15.2,
}


@pytest.mark.parametrize("key", INSTRUCTIONS, ids=lambda key: key.kernel)
def test_instructions_of_the_hot_loop(key):
    config = configs.TABLE[key]
    assert resources.usage(90, key, config).per_element(config) <= 1.1 * INSTRUCTIONS[key]


LAUNCHED = [
    {"WHOLE": False},
    {"p_q_pos": None, "p_k_pos": None},
    {"heads": 1},
    {"N": 1, "WHOLE": False},
    {"p_dq": None},
    {"p_dk": None},
    {"p_dv": None},
    {"p_dk": None, "p_dv": None},
]


@pytest.mark.parametrize("constants", LAUNCHED, ids=str)
@pytest.mark.parametrize("kernel", ["forward", "backward", "backward_queries", "backward_keys"])
def test_variants_that_are_launched(kernel, constants):
    """Other gradients, other position terms, ragged sizes: each compiles within the same shared memory."""
    if not set(constants) <= set(resources.SOURCES[kernel].arg_names):
        pytest.skip(f"{kernel} has no such argument")
    key = next(key for key in configs.TABLE if (key.kernel, key.itemsize, key.rank) == (kernel, 2, 64))
    usage = resources.usage(90, key, configs.TABLE[key], **constants)
    assert usage.shared <= configs.SHARED_MEMORY[90]


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("generation", configs.GENERATIONS)
def test_every_problem_has_a_configuration(kernel, itemsize, generation):
    for tokens in (1, 17, 64, 65, 196, 256, 257, 1024, configs.MAX_TOKENS):
        for rank in (1, 16, 32, 48, 64, 80, 96, 128):
            config = configs.lookup(kernel, generation, itemsize, tokens, rank)
            if kernel in ("backward", "apply"):  # take all keys at once, or leave the problem to others
                assert config is None or config.BN >= tokens
            else:
                assert config is not None and config.num_warps in (4, 8)
    assert configs.lookup(kernel, generation, itemsize, 64, 129) is None


@pytest.mark.parametrize("BN", [16, 32, 64, 128, 256])
def test_blocks_hold_all_keys_with_little_padding(BN):
    for tokens in range(1, 2 * BN + 1):
        blocks = configs.key_blocks(tokens, BN, itemsize=2)
        assert 1 <= len(blocks) <= 3 and all(each >= 16 and each & (each - 1) == 0 for each in blocks)
        assert sum(blocks[:-1]) < tokens <= sum(blocks), "only the last block has a mask"
    assert configs.key_blocks(197, 128, 2) == (128, 64, 16)
    assert configs.key_blocks(2 * BN + 1, BN, 2) == configs.key_blocks(BN + 1, BN, 4) == ()


@pytest.mark.parametrize("processors", [108, 114, 128, 132, 142, 148, 170])
@pytest.mark.parametrize("per_head", [1, 2, 4])
def test_waves_are_full(per_head, processors):
    """Rounding the number of programs up left half of the places empty at most of these sizes."""
    for heads in range(3, 17):
        for places in (processors, 2 * processors):
            programs = heads * per_head
            shares = launch.fewest_images(512, programs, places)
            rounds = -(-shares * programs // places) * -(-512 // shares)
            assert 512 * programs / (places * rounds) >= 0.85, (heads, places, shares)
