"""Registers, spills and shared memory of every kernel at its committed configurations, without a GPU.

    python -m convinit.kernels.report                  # all generations
    python -m convinit.kernels.report --generation 90

Each kernel is compiled as the widest launch would: both position terms, all gradients, and the largest r of
its entry.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convinit.kernels import configs, positional_attention, shared_attention

SOURCES = {
    "forward": positional_attention.forward_kernel,
    "forward_dropout": positional_attention.forward_kernel,
    "backward": positional_attention.backward_kernel,
    "backward_dropout": positional_attention.backward_kernel,
    "apply": shared_attention.apply_kernel,
    "map_gradient": shared_attention.map_gradient_kernel,
}
FLOAT32_POINTERS = ("p_lse", "p_dq_part", "p_dq_pos", "p_dk_pos", "p_dmap")


class Usage(NamedTuple):
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers, or arrays that could not be kept in registers
    shared: int  # bytes a program


def entries() -> Iterator[tuple[int, configs.Key, configs.Config, str]]:
    """(generation, key, configuration, precision of float32 products) of the committed table."""
    for generation in configs.GENERATIONS:
        for key, common in configs.TABLE.items():
            config = configs.OVERRIDES.get((generation, key), common)
            for precision in ("ieee", "tf32") if key.itemsize == 4 else ("ieee",):
                yield generation, key, config, precision


def usage(generation: int, key: configs.Key, config: configs.Config, precision: str = "ieee") -> Usage:
    """Compile one kernel for a generation of GPUs and read what the machine code uses."""
    fn = SOURCES[key.kernel]
    whole = key.tokens is not None and config.BN >= key.tokens
    constants: dict[str, object] = {
        "R": key.rank,
        "BM": config.BM,
        "BN": config.BN,
        "BR": key.rank,
        "ALL_KEYS": whole,
        "WHOLE_ROWS": whole,
        "PRECISION": precision,
    }
    if not key.kernel.endswith("dropout"):
        constants["p_seed"] = None
    if whole:
        constants["p_dq_part"] = None
    signature: dict[str, object] = {}
    constexprs: dict[tuple[int, ...], object] = {}
    attrs: dict[tuple[int, ...], list[list[object]]] = {}
    aligned: list[list[object]] = [["tt.divisibility", 16]]
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants[name]
        elif name == "p_seed":
            signature[name] = "*i64"
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in FLOAT32_POINTERS or key.itemsize == 4 else "*bf16"
            attrs[(i,)] = aligned
        elif name.startswith("stride_"):  # heads of a packed product: channels are adjacent
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attrs |= {(i, axis): aligned for axis in range(3)}
        else:
            signature[name] = "fp32" if name in ("scale", "alpha", "dropout_p") else "i32"
    compiled = triton.compile(
        ASTSource(fn, signature, constexprs=constexprs, attrs=attrs),
        target=GPUTarget("cuda", generation, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    registers, stack = read_machine_code(compiled.asm["cubin"])
    return Usage(registers, stack, compiled.metadata.shared)


def read_machine_code(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, by the cuobjdump in Triton's own package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [os.fspath(tool), "--dump-resource-usage", os.fspath(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump shows no resource usage: {text[:200]!r}")
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description="Resources of every kernel at its committed configurations.")
    parser.add_argument("--generation", type=int, choices=configs.GENERATIONS, help="this one alone")
    chosen = parser.parse_args().generation
    columns = "{:>10} {:<16} {:>8} {:>4} {:>5} {:>4} {:>4} {:>5} {:>6} {:>9} {:>5} {:>8}"
    print(columns.format(*"generation kernel dtype r≤ N≤ BM BN warps stages registers stack shared".split()))
    for generation, key, config, precision in entries():
        if chosen in (None, generation):
            dtype = precision if key.itemsize == 4 else "16-bit"
            row = (generation, key.kernel, dtype, key.rank, key.tokens or "any", *config)
            print(columns.format(*row, *usage(generation, key, config, precision)), flush=True)


if __name__ == "__main__":
    main()
