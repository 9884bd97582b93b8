from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import convinit
from convinit import _library
from convinit.adapters.types import OLDEST, is_a

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *, cwd: Path, **environment: str) -> str:
    """What `code` prints in a fresh interpreter started in `cwd`."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_is_the_installed_one():
    assert convinit.__version__ == metadata.version("convinit")


def test_the_citation_is_of_this_version():
    if not (ROOT / "CITATION.cff").exists():
        pytest.skip("needs a source checkout")
    assert f"\nversion: {convinit.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_public_names_exist():
    for name in convinit.__all__:
        assert hasattr(convinit, name), name
        assert name in dir(convinit)


def test_names_come_when_they_are_used(tmp_path):
    code = """
import pickle, sys
import convinit, convinit.train
assert "torch" not in sys.modules
try:
    convinit.fit_kq
except AttributeError as error:
    assert str(error) == "module 'convinit' has no attribute 'fit_kq'"
convinit.fit_qk
import torch
torch.ops.convinit.impulse_matrix, torch.ops.convinit.positional_attention
assert pickle.loads(pickle.dumps(convinit.fit_qk)) is convinit.fit_qk is convinit.fit.fit_qk
from convinit import *
assert nn.ConvInitAttention is ConvInitAttention and convinit.train.load_data
assert pickle.loads(pickle.dumps(ConvInitAttention)) is ConvInitAttention
"""
    run_python(code, cwd=tmp_path)


def test_ops_are_registered_where_torch_was_imported_before(tmp_path):
    run_python("import torch, convinit; torch.ops.convinit.positional_attention", cwd=tmp_path)


def test_threads_that_use_the_first_names_at_once(tmp_path):
    code = """
import convinit
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    assert all(pool.map(lambda name: getattr(convinit, name), ["fit_qk", "init", "nn", "InitReport"] * 8))
"""
    run_python(code, cwd=tmp_path)


WHERE = """
import importlib.util, convinit
from pathlib import Path
from convinit.kernels import tuned
assert len(convinit.__path__) == len(convinit.kernels.__path__) == 1
# Nothing else of a checkout is part of the package: setup.py would run.
for name in ("setup", "tests", "benchmarks", "csrc"):
    assert importlib.util.find_spec(f"convinit.{name}") is None, name
print(Path(tuned.__file__).parent)
"""


def where(cwd: Path, **environment: str) -> Path:
    """The folder that convinit.kernels is imported from, by an interpreter started in `cwd`."""
    return Path(run_python(WHERE, cwd=cwd, **environment).strip())


@pytest.fixture
def checkout(tmp_path):
    """The source tree as git has it, links included; what a wheel's tests run beside has none."""
    if not (ROOT / "convinit").is_dir():
        pytest.skip("needs a source checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("convinit", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout"


def built(folder: Path) -> Path:
    """The folder with the library that this interpreter loads."""
    for path in Path(convinit.__file__).parent.glob("_C*.so"):
        shutil.copy(path, folder / "convinit")
    return folder


def test_kernels_of_the_installation(tmp_path):
    assert where(tmp_path) == Path(convinit.__file__).parent / "kernels"


def test_kernels_of_a_checkout_on_the_path(checkout, tmp_path):
    assert where(tmp_path, PYTHONPATH=str(built(checkout))) == checkout / "convinit" / "kernels"
    assert (checkout / "kernels").samefile(checkout / "convinit" / "kernels")


def test_kernels_of_a_wheel(checkout, tmp_path):
    """The source distribution holds them once, and what is built from it holds them in the package."""

    def setup(*words: str) -> None:
        command = [sys.executable, "setup.py", "-q", *words]
        subprocess.run(command, cwd=checkout, check=True, capture_output=True)

    setup("sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.glob("convinit-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    shutil.rmtree(checkout)
    (tmp_path / archive.name.removesuffix(".tar.gz")).rename(checkout)
    assert [path.relative_to(checkout).parts for path in checkout.rglob("tiles.py")] == [
        ("convinit", "kernels", "tiles.py")
    ]
    setup("build_py", "--build-lib", str(tmp_path / "site"))
    assert where(tmp_path, PYTHONPATH=str(built(tmp_path / "site"))) == tmp_path / "site/convinit/kernels"


def test_build_info():
    info = convinit.build_info()
    assert info["convinit"] == convinit.__version__
    assert info["torch"] == torch.__version__
    assert info["stable_abi"] == "2.10"
    assert re.fullmatch(r"2\.\d+\.\d+", info["torch_compiled"])
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["cxx_standard"] == "C++20"
    assert info["num_threads"] == torch.get_num_threads()
    assert (info["gpu"] is not None) == torch.cuda.is_available()
    assert (info["cuda_compiled"] is not None) == info["cuda_ops"]


def test_cuda_ops_are_registered_without_a_gpu():
    if not convinit.build_info()["cuda_ops"]:
        pytest.skip("needs a CUDA build of torch and the CUDA library")
    for op in ("impulse_conv", "impulse_matrix", "qk_solver"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"convinit::{op}", "CUDA"), op
    info = convinit.build_info()
    assert re.fullmatch(r"\d+\.\d+", info["cuda_compiled"])
    assert re.fullmatch(r"sm_\d+(, sm_\d+)*", info["cuda_architectures"])


def test_op_device_leaves_gpus_that_the_library_does_not_serve(monkeypatch):
    config = {
        "cuda_compiled": "13.0", "cuda_driver": "13.0", "cuda_architectures": "800,900,1000",
        "cuda_ptx": "1000",
    }  # fmt: skip
    monkeypatch.setattr(_library, "_HAS_CUDA_OPS", True)
    monkeypatch.setattr(_library, "_cuda_config", lambda: config)
    capabilities = iter([(8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (7, 5), (12, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: next(capabilities))
    gpu = torch.device("cuda:1")
    for _ in range(5):  # to 12.0, by the PTX of 10.0
        assert _library.op_device(gpu) == gpu
    with pytest.warns(UserWarning, match="on the CPU instead of cuda:1: .* sm_80, sm_90, sm_100, .* sm_75"):
        assert _library.op_device(gpu).type == "cpu"
    config["cuda_ptx"] = ""
    with pytest.warns(UserWarning, match="built for sm_80, sm_90, sm_100, and this GPU is sm_120"):
        assert _library.op_device(gpu).type == "cpu"
    config["cuda_driver"] = "12.8"
    with pytest.warns(UserWarning, match="built with CUDA 13.0, .* driver knows CUDA 12.8 at most"):
        assert _library.op_device(gpu).type == "cpu"
    monkeypatch.setattr(_library, "_HAS_CUDA_OPS", False)
    assert _library.op_device(gpu).type == "cpu"


@pytest.mark.parametrize("stem", ["_C", "_C_cuda"])
def test_shared_object_never_refers_to_python(stem):
    if sys.platform == "win32" or shutil.which("nm") is None:
        pytest.skip("needs nm")
    path = _library._find(stem)
    if path is None and stem == "_C_cuda":
        pytest.skip("built without CUDA")
    assert path is not None
    flags = ["-u"] if sys.platform == "darwin" else ["-D", "--undefined-only"]
    listing = subprocess.run(["nm", *flags, path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines() if line.strip()]
    assert any("aoti_torch" in symbol for symbol in symbols)  # the listing is the right one
    assert [s for s in symbols if re.match(r"_?_?Py[A-Z_]", s)] == []
    # The stable ABI alone: nothing of torch's C++ namespaces, which change from release to release.
    assert [s for s in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", s)] == []


def test_missing_library_explains_itself(tmp_path):
    """A source checkout that was never built, imported in place of the installed package."""
    source = Path(convinit.__file__).parent
    shutil.copytree(source, tmp_path / "convinit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import convinit\ntry:\n    convinit.fit_qk\nexcept ImportError as error:\n    print(error)"
    message = run_python(code, cwd=tmp_path)
    assert "no _C.abi3.so in" in message
    assert "pip install --no-build-isolation -e ." in message


def test_broken_library_explains_itself(tmp_path):
    source = Path(convinit.__file__).parent
    shutil.copytree(source, tmp_path / "convinit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "convinit" / "_C.abi3.so").write_bytes(b"no library")
    code = "import convinit\ntry:\n    convinit.fit_qk\nexcept ImportError as error:\n    print(error)"
    message = run_python(code, cwd=tmp_path)
    assert f"cannot be loaded under torch {torch.__version__}" in message
    assert "build it again" in message


def test_cuda_library_is_left_alone_under_a_cpu_torch(tmp_path):
    source = Path(convinit.__file__).parent
    shutil.copytree(source, tmp_path / "convinit", ignore=shutil.ignore_patterns("_C_cuda*", "__pycache__"))
    (tmp_path / "convinit" / "_C_cuda.abi3.so").write_bytes(b"no library")
    code = "try:\n    import convinit.ops.impulse_matrix\nexcept ImportError as error:\n    print(error)"
    message = run_python(code, cwd=tmp_path)
    if torch.version.cuda is None:
        assert message == ""
    else:
        assert "_C_cuda.abi3.so cannot be loaded" in message


def test_old_torch_explains_itself(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"needs torch 2.10 or newer, found 2.9.1\+cpu"):
        _library._load()


def test_import_leaves_the_compiler_alone():
    """torch._dynamo and sympy take a second, which every process and worker would wait."""
    code = "import sys, convinit; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_extras_ask_for_the_releases_that_the_adapters_know():
    """`pip install convinit[...]` brings no library that init_vit_ would then refuse."""
    floors = dict(
        re.findall(r'"(timm|transformers|vit-pytorch)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    )
    known = {name.replace("_", "-"): ".".join(map(str, oldest)) for name, oldest in OLDEST.items()}
    assert known == floors


@pytest.mark.parametrize(
    "library, kind", [("timm", "vision_transformer.VisionTransformer"), ("transformers", "x.Y")]
)
def test_an_older_release_is_named(library, kind, monkeypatch):
    package, _, name = f"{library}.models.{kind}".rpartition(".")
    module = type(name, (torch.nn.Module,), {"__module__": package})()
    monkeypatch.setitem(sys.modules, library, SimpleNamespace(__version__="0.9.16"))
    with pytest.raises(ValueError, match=f"convinit needs {library} .* or newer, found 0.9.16; pip install"):
        is_a(module, f"{package}.{name}")
    assert not is_a(module, "timm.other.Thing")
    monkeypatch.setitem(sys.modules, library, SimpleNamespace(__version__="99.0.0.dev0"))
    assert is_a(module, f"{package}.{name}")
