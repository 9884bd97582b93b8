"""What the machine code of every kernel is like at its committed configurations, without a GPU.

    python -m convinit.kernels.resources                  # all generations
    python -m convinit.kernels.resources --generation 90

Each kernel is compiled as the launch of a full problem compiles it: both position terms, all gradients, and
the largest r and N of its entry.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convinit.kernels import configs, positional_attention, shared_attention

SOURCES = {
    "forward": positional_attention.forward_kernel,
    "backward": positional_attention.backward_kernel,
    "backward_queries": positional_attention.backward_queries_kernel,
    "backward_keys": positional_attention.backward_keys_kernel,
    "apply": shared_attention.apply_kernel,
    "map_gradient": shared_attention.map_gradient_kernel,
}
FLOAT32_POINTERS = ("p_lse", "p_delta", "p_dmap")
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")  # of generations 80 and 120, 90, 100


class Usage(NamedTuple):
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers, or arrays that could not be kept in registers
    shared: int  # bytes a program
    tensor_memory: int  # columns of generation 100's 512
    loop: Mapping[str, int]  # {opcode: how often} in the innermost loop that has the most products
    keys: int  # that a pass of the loop deals with

    def per_element(self, config: configs.Config) -> float:
        """Instructions of a thread for each (query, key) of a pass of the loop."""
        return sum(self.loop.values()) * 32 * config.num_warps / (config.BM * self.keys)


def entries() -> Iterator[tuple[int, configs.Key, configs.Config, str]]:
    """(generation, key, configuration, precision of float32 products) of the committed table."""
    for generation in configs.GENERATIONS:
        for key, common in configs.TABLE.items():
            config = configs.OVERRIDES.get((generation, key), common)
            if config is not None:
                for precision in ("tf32x3", "tf32") if key.itemsize == 4 else ("ieee",):
                    yield generation, key, config, precision


def usage(
    generation: int, key: configs.Key, config: configs.Config, precision: str = "ieee", **constants: object
) -> Usage:
    """Compile one kernel for a generation of GPUs and read what its machine code uses.

    constants: other values of the kernel's arguments, such as p_q_pos=None or WHOLE=False.
    """
    fn = SOURCES[key.kernel]
    blocks: tuple[int, ...] = ()
    if key.kernel == "forward" and key.tokens is not None:
        blocks = configs.key_blocks(key.tokens, config.BN, key.itemsize)
    constants = {
        "R": key.rank,
        "BM": config.BM,
        "BN": config.BN,
        "BR": key.rank,
        "BLOCKS": blocks,
        "WHOLE": not blocks or (key.tokens == sum(blocks) and sum(blocks) % config.BM == 0),
        "PRECISION": precision,
    } | constants
    signature: dict[str, object] = {}
    constexprs: dict[tuple[int, ...], object] = {}
    attrs: dict[tuple[int, ...], list[list[object]]] = {}
    aligned: list[list[object]] = [["tt.divisibility", 16]]
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants[name]
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name in FLOAT32_POINTERS or key.itemsize == 4 else "*bf16"
            attrs[(i,)] = aligned
        elif name.startswith("stride_"):  # heads of a packed product: channels are adjacent
            signature[name] = ("i32", "i32", "i32", "constexpr")
            constexprs[(i, 3)] = 1
            attrs |= {(i, axis): aligned for axis in range(3)}
        else:
            signature[name] = "fp32" if name == "alpha" or name.endswith("scale") else "i32"
            if name == "N":
                attrs[(i,)] = aligned
    compiled = triton.compile(
        ASTSource(fn, signature, constexprs=constexprs, attrs=attrs),
        target=GPUTarget("cuda", generation, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )
    resources, code = disassemble(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump shows no resource usage: {resources[:200]!r}")
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    keys = sum(blocks) or config.BN
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared, tensor_memory, hot_loop(code), keys)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the cuobjdump in Triton's own package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources, code = (
            subprocess.run(
                [os.fspath(tool), what, os.fspath(path)], capture_output=True, text=True, check=True
            )
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    return resources.stdout, code.stdout


def hot_loop(code: str) -> Counter[str]:
    """Opcodes of the innermost loop with the most matrix products; of all the code, if there is no loop."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    rows = [(int(address, 16), opcode.split(".")[0], rest) for address, opcode, rest in lines]
    loops = []
    for address, opcode, rest in rows:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode == "BRA" and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [Counter(op for at, op, _ in rows if start <= at <= end) for start, end in innermost]
    whole = Counter(op for _, op, _ in rows)
    return max(bodies, key=lambda body: sum(body[op] for op in TENSOR_CORES), default=whole)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Machine code of every kernel at its committed configurations."
    )
    parser.add_argument("--generation", type=int, choices=configs.GENERATIONS, help="this one alone")
    chosen = parser.parse_args().generation
    columns = "{:>3} {:<16} {:>6} {:>4} {:>4} {:>4} {:>4} {:>5} {:>6} {:>9} {:>5} {:>7} {:>12} {:>8}"
    head = "sm kernel dtype r≤ N≤ BM BN warps stages registers stack shared instructions products"
    print(columns.format(*head.split()))
    for generation, key, config, precision in entries():
        if chosen in (None, generation):
            dtype = precision if key.itemsize == 4 else "16-bit"
            used = usage(generation, key, config, precision)
            products = sum(used.loop[op] for op in TENSOR_CORES)
            row = (generation, key.kernel, dtype, key.rank, key.tokens or "any", *config[:4])
            figures = (*used[:3], f"{used.per_element(config):.1f}", products)
            print(columns.format(*row, *figures), flush=True)


if __name__ == "__main__":
    main()
