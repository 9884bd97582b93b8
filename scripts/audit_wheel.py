"""Audits a wheel before it is published, and writes the one to publish.

    python scripts/audit_wheel.py dist/convinit-*.whl --out wheelhouse

Checks that it serves every Python from 3.10 and every torch from 2.10 on (abi3, LibTorch's stable ABI), that
it holds what it should and nothing of the machine that built it, and which GPUs it has code for. auditwheel
then gives it its manylinux tag; torch's own libraries stay outside. Needs auditwheel, patchelf, nm and, for a
wheel with CUDA, cuobjdump: of the CUDA toolkit, of Triton's package, or named in CUOBJDUMP.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

LARGEST = 5_000_000  # bytes
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
PTX = ["sm_120"]  # what cuobjdump calls the PTX of compute_120
LIBRARIES = ("convinit/_C.abi3.so", "convinit/_C_cuda.abi3.so")
# Paths that the CUDA run-time library and the loader need, on any Linux.
SYSTEM_PATHS = re.compile(rb"/(proc|sys|dev)/|/lib64/ld-linux|^/cudart\.shm")


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def find_cuobjdump() -> str:
    """The toolkit's, or the one in Triton's package."""
    found = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if found is None and os.environ.get("CUDA_HOME"):
        found = shutil.which("cuobjdump", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    if found is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends/nvidia/bin")
    if found is None:
        raise RuntimeError("cuobjdump was not found: install the CUDA toolkit or triton, or set CUOBJDUMP")
    return found


def check_tags(wheel: Path, files: zipfile.ZipFile) -> str:
    assert "-cp310-abi3-" in wheel.name, f"{wheel.name} is no cp310-abi3 wheel"
    name = next(name for name in files.namelist() if name.endswith(".dist-info/WHEEL"))
    tags = re.findall(r"^Tag: (.+)$", files.read(name).decode(), re.MULTILINE)
    assert tags and all(tag.startswith("cp310-abi3-linux") for tag in tags), tags
    return ", ".join(tags)


def check_size(wheel: Path) -> str:
    size = wheel.stat().st_size
    assert size < LARGEST, f"{size} bytes, more than {LARGEST}"
    return f"{size:,} bytes"


def check_contents(files: zipfile.ZipFile, cuda: bool) -> str:
    names = set(files.namelist())
    wanted = {"convinit/__init__.py", "convinit/py.typed", "convinit/kernels/positional_attention.py"}
    wanted |= set(LIBRARIES if cuda else LIBRARIES[:1])
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2 and "convinit" in top, f"more than the package: {sorted(top)}"
    libraries = {name for name in names if ".so" in name}
    assert libraries <= set(LIBRARIES), f"unexpected libraries: {sorted(libraries)}"
    stray = [name for name in names if name.endswith((".cu", ".cpp", ".h", ".cuh", ".pyc"))]
    assert not stray, f"stray files: {stray}"
    return f"{len(names)} files"


def check_symbols(library: Path) -> str:
    """The stable ABI's C shims alone: not Python, nor torch's C++ names, which each release may change."""
    symbols = []
    for line in run("nm", "-D", "--undefined-only", library).splitlines():
        kind, symbol = line.split()[-2:]
        if kind == "U" and not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", symbol):
            symbols.append(symbol)
    strangers = [symbol for symbol in symbols if not symbol.startswith(("aoti_torch_", "torch_"))]
    assert symbols and not strangers, f"not of the stable ABI: {strangers}"
    return f"{len(symbols)} symbols, all aoti_torch_* or torch_*"


def check_paths(library: Path) -> str:
    here = (Path.cwd(), Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()))
    data = library.read_bytes()
    found = {str(path) for path in here if path != Path("/") and os.fsencode(path) + b"/" in data}
    strings = re.findall(rb"[\x20-\x7e]{6,}", data)
    absolute = [text for text in strings if re.match(rb"/[\w.-]+/[\w.+-]+", text) or b"site-packages" in text]
    found |= {text.decode() for text in absolute if not SYSTEM_PATHS.search(text)}
    assert not found, f"paths of the build machine: {sorted(found)}"
    return "none"


def check_architectures(library: Path) -> str:
    tool = find_cuobjdump()
    code, ptx = (
        sorted(set(re.findall(r"sm_\d+[af]?", run(tool, option, library))), key=lambda sm: int(sm[3:]))
        for option in ("--list-elf", "--list-ptx")
    )
    assert (code, ptx) == (ARCHITECTURES, PTX), f"machine code {code}, PTX {ptx}"
    return f"machine code for {', '.join(code)}; PTX for {', '.join(ptx)}"


def repair(wheel: Path, out: Path) -> str:
    excluded = ("--exclude", "libtorch*.so", "--exclude", "libc10*.so")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", folder, wheel)
        (repaired,) = Path(folder).glob("*.whl")
        assert "manylinux" in repaired.name, f"{repaired.name} has no manylinux tag"
        with zipfile.ZipFile(repaired) as files:
            grafted = [name for name in files.namelist() if ".libs/" in name]
        assert not grafted, f"auditwheel copied libraries in: {grafted}"
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(repaired, out)
    return f"{out / repaired.name}"


def audit(wheel: Path, out: Path, cuda: bool) -> Iterator[tuple[str, bool, str]]:
    """(check, passed, what was found)."""
    with zipfile.ZipFile(wheel) as files, tempfile.TemporaryDirectory() as folder:
        checks = {
            "tags": lambda: check_tags(wheel, files),
            "size": lambda: check_size(wheel),
            "contents": lambda: check_contents(files, cuda),
        }
        for name in filter(set(files.namelist()).__contains__, LIBRARIES):
            path = Path(files.extract(name, folder))
            checks[f"symbols of {path.name}"] = lambda path=path: check_symbols(path)
            checks[f"build paths in {path.name}"] = lambda path=path: check_paths(path)
        if cuda:
            checks["GPUs"] = lambda: check_architectures(Path(folder) / LIBRARIES[1])
        checks["auditwheel"] = lambda: repair(wheel, out)
        for name, check in checks.items():
            try:
                yield name, True, check()
            except (AssertionError, RuntimeError, ValueError) as error:
                yield name, False, str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description="Audit a wheel and give it its manylinux tag.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path("wheelhouse"), help="folder for the wheel to publish"
    )
    parser.add_argument("--no-cuda", action="store_true", help="the wheel has the CPU ops alone")
    arguments = parser.parse_args()
    failed = 0
    for name, passed, found in audit(arguments.wheel, arguments.out, not arguments.no_cuda):
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {found}", flush=True)
        failed += not passed
    sys.exit(f"{failed} checks failed" if failed else 0)


if __name__ == "__main__":
    main()
