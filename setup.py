"""Builds `convinit._C`: CPU ops on LibTorch's stable ABI, so that one wheel serves every torch from 2.10 on.

The shared object never refers to Python; `torch.ops.load_library` loads it.
CUDA sources, where the tree has any, become a second one, `convinit._C_cuda`, under the control of
`CONVINIT_CUDA`: unset builds it where torch sees a GPU and nvcc is found, for that GPU; 0 leaves it out;
1, for wheels, insists and builds it for all GPU generations. `TORCH_CUDA_ARCH_LIST` names other GPUs.
`CONVINIT_WERROR=1`, for releases, makes errors of warnings; other people's newer compilers may find new ones.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from setuptools import Extension, find_packages, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"convinit: building needs PyTorch 2.10 or newer, and torch cannot be imported ({error}). "
        "Install it (pip install 'torch>=2.10') or build with isolation (pip install .)."
    )

ROOT = Path(__file__).resolve().parent
STABLE_ABI = (2, 10)  # the oldest torch that a wheel runs on
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
STABLE_ABI_FLAG = f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
CXX_STANDARD_PROBE = "#include <concepts>\n#include <span>\ntemplate <std::integral T> T same(T x);\n"
WARNINGS_ARE_ERRORS = os.environ.get("CONVINIT_WERROR", "") == "1"


def check_torch() -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < STABLE_ABI:
        sys.exit(
            f"convinit: building needs PyTorch 2.10 or newer, found {torch.__version__}. "
            "Upgrade it (pip install --upgrade torch)."
        )


def check_compiler() -> None:
    """Stops with a sentence instead of pages of compiler output."""
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    advice = "Install g++ 11 or clang 14 (or newer), for example: apt install g++; or name one in CXX."
    if not compiler or shutil.which(compiler[0]) is None:
        sys.exit(f"convinit: no C++ compiler found: {' '.join(compiler)!r} is not on PATH. {advice}")
    probe = subprocess.run(
        [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input=CXX_STANDARD_PROBE,
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        reason = (probe.stderr.strip() or "no message").splitlines()[0]
        sys.exit(f"convinit: {' '.join(compiler)!r} cannot compile C++20 ({reason}). {advice}")


def find_cuda_home() -> Path | None:
    """The CUDA toolkit of the nvcc found through CUDA_HOME, then PATH.

    torch's own CUDA_HOME is None under a CPU build of torch, which would skip CUDA in silence.
    The nvcc on PATH may be a link or a script that starts another one: nvcc itself tells where its home is.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def wanted_architectures(choice: str) -> str:
    """As TORCH_CUDA_ARCH_LIST has them: all for wheels, else those of the GPUs here, which may be none."""
    if choice == "1":
        return CUDA_ARCHITECTURES
    gpus = range(torch.cuda.device_count())
    return ";".join(sorted({"{}.{}".format(*torch.cuda.get_device_capability(gpu)) for gpu in gpus}))


def unknown_to_nvcc(cuda_home: Path, architectures: str) -> list[str]:
    """Those that this nvcc is too old, or too new, to compile for."""
    nvcc = cuda_home / "bin" / "nvcc"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    names = architectures.replace("+PTX", "").split(";")
    return [name for name in names if "compute_" + name.replace(".", "") not in known]


def want_cuda(cuda_home: Path | None, sources: list[str]) -> bool:
    """Whether to build the CUDA ops; sets TORCH_CUDA_ARCH_LIST, unless it is set."""
    choice = os.environ.get("CONVINIT_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"convinit: CONVINIT_CUDA must be 0, 1 or unset, got {choice!r}.")
    if choice == "0":
        return False
    if not sources:
        problem = "this source tree has no CUDA sources (csrc/*.cu)"
    elif cuda_home is None:
        problem = "nvcc was found neither through CUDA_HOME nor on PATH; install the CUDA toolkit"
    elif choice == "" and torch.version.cuda is None:
        problem = "this torch is a CPU build, under which they are not loaded; CONVINIT_CUDA=1 builds them"
    elif "TORCH_CUDA_ARCH_LIST" in os.environ:
        return True
    elif not (architectures := wanted_architectures(choice)):
        problem = "torch sees no GPU here; CONVINIT_CUDA=1 builds them for all GPUs"
    elif unknown := unknown_to_nvcc(cuda_home, architectures):
        problem = (
            f"nvcc in {cuda_home} cannot compile for {', '.join(unknown)}; take another one, or name other "
            "GPUs in TORCH_CUDA_ARCH_LIST"
        )
    else:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        return True
    if choice == "1":
        sys.exit(f"convinit: CONVINIT_CUDA=1 asks for the CUDA ops, but {problem}.")
    print(f"convinit: building the CPU ops alone: {problem}.", file=sys.stderr)
    return False


def common_flags() -> list[str]:
    flags = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
    flags += ["-Werror"] if WARNINGS_ARE_ERRORS else []
    flags.append(STABLE_ABI_FLAG)
    flags.append(f"-ffile-prefix-map={ROOT}=convinit")  # error messages must not hold the builder's paths
    for path in cpp_extension.include_paths():
        flags += ["-isystem", path, f"-ffile-prefix-map={path}=torch"]  # -isystem: no warnings from there
    return flags


def runtime_libraries() -> list[str]:
    """The C++ library comes before torch, which has copies of some of its symbols without their versions:
    linked to those, nothing would tell which systems the result runs on."""
    return [] if sys.platform == "darwin" else ["stdc++"]


def strip_flags() -> list[str]:
    return [] if sys.platform == "darwin" else ["-Wl,-s"]


def cpu_extension() -> Extension:
    return Extension(
        "convinit._C",
        sources("*.cpp"),
        depends=sources("*.h"),
        language="c++",
        py_limited_api=True,
        library_dirs=cpp_extension.library_paths(),
        libraries=[*runtime_libraries(), "torch_cpu", "c10"],
        extra_compile_args=common_flags(),
        extra_link_args=strip_flags(),
    )


def cuda_extension(cuda_home: Path) -> Extension:
    cpp_extension.CUDA_HOME = str(cuda_home)
    # "code=sm_90" is machine code; "code=compute_90" PTX, which later GPUs compile (not that of compute_90a).
    ptx = re.findall(r"code=compute_(\d+)\b", " ".join(cpp_extension._get_cuda_arch_flags()))
    host = [flag for flag in common_flags() if flag.startswith(("-f", "-W"))]
    includes = [*cpp_extension.include_paths(), str(cuda_home / "include")]
    # Not CUDAExtension: it links libtorch_cuda, which a CPU build of torch does not have. Linking libtorch as
    # the last library, needed or not, brings libtorch_cuda in at load time.
    return Extension(
        "convinit._C_cuda",
        sources("*.cu"),
        depends=sources("*.h") + sources("*.cuh"),
        language="c++",
        py_limited_api=True,
        library_dirs=[*cpp_extension.library_paths(), str(cuda_home / "lib64"), str(cuda_home / "lib")],
        libraries=[*runtime_libraries(), "torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={
            "cxx": common_flags(),
            "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", STABLE_ABI_FLAG]
            + ["-DCONVINIT_PTX=" + ",".join(f"{architecture}0" for architecture in ptx)]
            + (["-Werror", "all-warnings"] if WARNINGS_ARE_ERRORS else [])
            + [arg for path in includes for arg in ("-isystem", path)]
            + [f"-Xcompiler={flag}" for flag in host],
        },
        extra_link_args=[*strip_flags(), "-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"],
    )


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


class BuildExtension(cpp_extension.BuildExtension):
    """torch's build step with the checks that turn a failed build into a sentence."""

    def build_extensions(self) -> None:
        check_torch()
        check_compiler()
        if self.editable_mode and len(self.extensions) == 1:  # one of an earlier build would be loaded
            for stale in (ROOT / "convinit").glob("_C_cuda.*so"):
                stale.unlink()
        # torch refuses an nvcc of another major version than its own CUDA. That is for what links torch's
        # CUDA runtime or its C++ API; ours has a runtime of its own and the stable ABI alone.
        with mock.patch.object(cpp_extension, "_check_cuda_version", lambda *_: None, create=True):
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """qk_solver.cpp and qk_solver.cu make one object each: a folder for each extension's.

        An editable install would have a new folder each time; in one that stays ninja compiles what changed.
        A folder for each torch, for ninja takes no notice of its headers.
        """
        shared = self.build_temp
        top = ROOT / "build" / f"editable-torch-{torch.__version__}" if self.editable_mode else Path(shared)
        self.build_temp = str(top / ext.name)
        os.makedirs(self.build_temp, exist_ok=True)
        super().build_extension(ext)
        self.build_temp = shared


def extensions() -> list[Extension]:
    cuda_home = find_cuda_home()
    with_cuda = want_cuda(cuda_home, sources("*.cu"))
    return [cpu_extension(), *([cuda_extension(cuda_home)] if with_cuda and cuda_home else [])]


check_torch()
setup(
    # kernels/ lies at the top of the tree, for it is read for its own sake; convinit/kernels is a link to it.
    packages=find_packages(include=["convinit", "convinit.*"]),
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
