#!/usr/bin/env bash
# Every check and benchmark that needs a GPU, in one command of at most 10 minutes, without network.
#
#     bash scripts/gpu_check.sh OUT           # builds the compiled library from this checkout (needs nvcc)
#     bash scripts/gpu_check.sh OUT WHEEL     # takes a wheel that was built elsewhere
#
# Needs python3 with torch (CUDA), numpy, pytest, pytest-benchmark and hypothesis; with pandas and matplotlib the
# benchmarks get a report, with pytest-xdist the Triton tests take a tenth of the time. The attention kernels against
# PyTorch's come first, then tests and sanitizers, then all other benchmarks. Each part has its own time limit, and its
# log is in OUT as soon as it ends: a part that hangs costs the others nothing. OUT gets summary.txt, tests.log,
# benchmarks.log, and results.tar.gz with result files and reports.
set -uo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: bash scripts/gpu_check.sh OUT [WHEEL]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(realpath "$1") wheel=${2:+$(realpath "$2")}
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
summary=$out/summary.txt
: > "$summary"

# part NAME SECONDS LOG COMMAND...: runs it, appends its output to LOG, notes how it ended. An interrupt comes first, so
# that pytest can still write what it has.
part() {
    local name=$1 limit=$2 log=$3 start=$SECONDS code
    shift 3
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$scratch/$name.log" 2>&1
    code=$?
    { echo "=== $name: $*"; cat "$scratch/$name.log"; echo; } >> "$log"
    local word=ok
    [ $code -eq 0 ] || word="FAILED ($code)"
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then word="TIMED OUT after $limit s"; fi
    [ $code -eq 0 ] || touch "$scratch/failed"
    printf '%-24s %-24s %4d s  %s\n' "$name" "$word" $((SECONDS - start)) "$(tail -n 1 "$scratch/$name.log" | cut -c1-100)" |
        tee -a "$summary"
}

# Tests and benchmarks run on copies, beside an installed convinit: the checkout's own has no library for this machine.
cp -r "$root"/{tests,benchmarks,csrc,scripts,pyproject.toml} "$scratch"
revision=$(git -C "$root" rev-parse --short=12 HEAD 2> /dev/null || echo unknown)
export CONVINIT_REVISION=${CONVINIT_REVISION:-$revision}
export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$scratch/triton

build() {
    cp -r "$root" "$scratch/source"
    cd "$scratch/source" || return
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
    export TORCH_CUDA_ARCH_LIST CONVINIT_CUDA=1
    "$python" setup.py --quiet build --build-lib "$scratch/site" --build-temp "$scratch/objects"
}
export -f build
export root scratch python
cd "$scratch" || exit
part machine 10 "$out/tests.log" nvidia-smi
if [ -n "$wheel" ]; then
    part install 30 "$out/tests.log" "$python" -m pip install --no-index --no-deps --target "$scratch/site" "$wheel"
else
    part build 85 "$out/tests.log" bash -c build
fi
part build_info 20 "$out/tests.log" "$python" -c '
import json, sys, torch, convinit
print(json.dumps(convinit.build_info(), indent=1))
assert convinit.build_info()["cuda_ops"], "the CUDA library is not loaded"
if convinit.build_info()["gpu_problem"]: sys.exit(convinit.build_info()["gpu_problem"])
print(torch.cuda.get_device_name(), torch.__version__)'

bench() { "$python" benchmarks/run.py --suite gpu "$@"; }
export -f bench
part attention 75 "$out/benchmarks.log" bash -c "bench --only attention --minutes 1 --out '$scratch/results/attention'"

# Checks of correctness run side by side, benchmarks alone. compute-sanitizer sees a small selection of tests, on memory
# straight from the driver: torch's pool would hide what is out of bounds. racecheck looks at our CUDA kernels alone;
# memcheck at Triton's, too; initcheck has to see who else has written what they read.
pytest=("$python" -m pytest -q -p no:cacheprovider)
workers=()
"$python" -c 'import xdist' 2> /dev/null && workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
small='test_equals_reference or test_offsets_may_be_strided or test_strided_inputs or test_sharp_logits'
small+=' or test_memory_of_committed_configurations'
cuda_tests=(tests/ops/test_{impulse_conv,impulse_matrix,qk_solver}.py)
sanitizer() {
    part "$1" 170 "$out/tests.log" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
        --error-exitcode 66 "${@:2}" "${pytest[@]}" -m gpu -k "$small" "${cuda_tests[@]}" tests/kernels/test_kernels_gpu.py
}
part tests 170 "$out/tests.log" "${pytest[@]}" -m gpu "${cuda_tests[@]}" tests/{fit/test_fit,test_offsets,adapters/test_transformers_attention}.py &
part triton_tests 170 "$out/tests.log" "${pytest[@]}" "${workers[@]}" -m gpu tests/kernels/test_kernels_gpu.py &
if command -v compute-sanitizer > /dev/null; then
    sanitizer memcheck &
    sanitizer racecheck --kernel-name kns=convinit &
    sanitizer initcheck &
else
    echo "compute-sanitizer is not installed: memcheck, racecheck and initcheck were not run" | tee -a "$summary"
fi
wait

# The suite stops by itself, with what it has, before the limit.
part benchmarks 200 "$out/benchmarks.log" bash -c "bench --minutes 3 --out '$scratch/results/all'"
tar -czf "$out/results.tar.gz" -C "$scratch" results

if [ -e "$scratch/failed" ]; then
    echo "some parts failed, $SECONDS s" | tee -a "$summary"
    exit 1
fi
echo "all parts passed, $SECONDS s" | tee -a "$summary"
