#!/usr/bin/env bash
# Installs a wheel beside one version of torch and runs there what the compiled library serves: its tests, and a fit.
#
#     bash scripts/test_wheel.sh wheelhouse/convinit-*.whl 2.10.0
#     TORCH_BUILD=cpu bash scripts/test_wheel.sh WHEEL 2.13.0+cpu    # and fail if that torch is no CPU build
#     ENV=$HOME/env-2.10 bash scripts/test_wheel.sh WHEEL 2.10.0 tests -m "not slow"    # keep the environment; all tests
#
# torch comes from wherever pip is told to look (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL). TORCH_BUILD, cpu or cuda, says
# which kind of build is wanted: a plain 2.13.0 may be either. PYTHON names the interpreter (python3). The tests run on
# copies, away from this checkout: its convinit/ would be imported in place of the installed one.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: [TORCH_BUILD=cpu|cuda] [ENV=FOLDER] [PYTHON=python3] bash scripts/test_wheel.sh WHEEL TORCH_VERSION" \
         "[PYTEST ARGUMENTS]" >&2
    exit 2
fi
wheel=$(realpath "$1") torch=$2
shift 2
case ${TORCH_BUILD:-} in
    "" | cpu | cuda) ;;
    *) echo "TORCH_BUILD must be cpu, cuda or unset, got ${TORCH_BUILD@Q}" >&2 && exit 2 ;;
esac
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
env=${ENV:-$scratch/env}
[ $# -gt 0 ] || set -- tests/{test_package,test_offsets,fit/test_fit,init/test_init,nn/test_linear,nn/test_attention}.py \
    tests/ops/test_{impulse_conv,impulse_matrix,native_attention,native_shared_attention,qk_solver}.py

[ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
python=$env/bin/python
echo "torch==$torch" > "$scratch/constraints"
"$python" -m pip install --quiet --constraint "$scratch/constraints" torch pytest hypothesis "$wheel[demo]"
"$python" -m pip install --quiet --no-deps --force-reinstall "$wheel"

cp -r "$root"/{tests,benchmarks,csrc,scripts,pyproject.toml} "$scratch"
cd "$scratch"
"$python" - "$env" <<'PYTHON'
import json, os, sys, torch, convinit
build, wanted = "cpu" if torch.version.cuda is None else "cuda", os.environ.get("TORCH_BUILD")
if wanted and build != wanted:
    sys.exit(f"TORCH_BUILD={wanted}, but pip found torch {torch.__version__}, a {build} build")
assert convinit.__file__.startswith(sys.argv[1]), convinit.__file__
print(json.dumps(convinit.build_info(), indent=1))
assert convinit.build_info()["cuda_ops"] == (torch.version.cuda is not None)
P = convinit.nn.sincos_2d((16, 16), 512)
offsets = convinit.sample_offsets(8, 5, generator=torch.Generator().manual_seed(0))
fit = convinit.fit_qk(P, offsets, (16, 16), 64, scale=0.1, weight_norm=8.77)
assert fit.mse.max() < 1.6e-4 and fit.hit_rate.min() == 1, fit
print(fit.table())
PYTHON
"$python" -m pytest -q -p no:cacheprovider "$@"
