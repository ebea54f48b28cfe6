#!/usr/bin/env bash
# Rung 7: one command on a machine with an NVIDIA GPU and the CUDA toolkit; it needs no network and ends within 10 minutes.
#   bench/gpu.sh           builds core, binding and microbenchmark, then checks everything and takes the first times (bench/gpu/run.py truth)
#   bench/gpu.sh long      the long part: every grid, products beside cuBLASLt, sanitizers, hardware counters, tests with ranks on one GPU
#   bench/gpu.sh SET --built        takes what python/gingham holds, nothing is built;  further words go to bench/gpu/run.py
#   python bench/gpu/run.py SET --list      the parts, their limits and what they are known to take; needs no GPU
# Writes gpu_SET.json, gpu_SET.log and build.log into OUT (bench/results), the table last. Status: the number of parts that failed, those
# without time left among them; 2 where nothing was run. Python (3.11 or newer, with torch for CUDA): PYTHON=..., else .venv, else python3.
set -uo pipefail
cd "$(dirname "$0")/.."
stop() { echo "gpu.sh: $1" >&2; exit 2; }
command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1 || stop "no NVIDIA GPU here, nothing was run"

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
SET=truth
[ $# -gt 0 ] && [ "${1#-}" = "$1" ] && { SET=$1; shift; }
built=no
[ "${1:-}" = --built ] && { built=yes; shift; }
OUT=${OUT:-bench/results}
"$PYTHON" -c 'import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
sys.exit("lacking: " + ", ".join(missing) if missing else 0)' torch numpy safetensors rich cloudpickle pytest $([ $built = no ] && echo pybind11) ||
  stop "$PYTHON cannot run the parts: name another with PYTHON=..."
mkdir -p "$OUT" build
echo "gingham $(git rev-parse --short HEAD 2> /dev/null || echo 'of an unknown commit'), $(date -u +%FT%TZ), $("$PYTHON" --version), driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)"

if [ $built = no ]; then
  command -v nvcc > /dev/null || stop "no nvcc on PATH: install the CUDA toolkit"
  beside=$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')")
  export PATH="$beside:$PATH"  # cmake and ninja of the same environment first
  CAPABILITY=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '.')
  [ "$CAPABILITY" = 90 ] && ARCH=90a || ARCH=$CAPABILITY
  began=$SECONDS
  cmake -S . -B build/gpu $(command -v ninja > /dev/null && echo -G Ninja) -DWITH_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$ARCH" -DGINGHAM_BINDING=ON \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DGINGHAM_OUTPUT="$PWD/python/gingham" > "$OUT/build.log" 2>&1 &&
    cmake --build build/gpu --target _C microbench samegpu --parallel "$(nproc)" >> "$OUT/build.log" 2>&1
  status=$?
  echo "built for sm_$ARCH in $((SECONDS - began)) s, status $status ($OUT/build.log)"
  [ $status -eq 0 ] || { grep -nE 'error|FAILED' "$OUT/build.log" | head -20; tail -n 20 "$OUT/build.log"; exit 1; }
fi

TORCH_BLAS=$("$PYTHON" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libtorch_cpu.so")' 2> /dev/null)
export GINGHAM_BLAS=${GINGHAM_BLAS:-$([ -e "$TORCH_BLAS" ] && echo "$TORCH_BLAS" || echo plain)}
# the wheels' libraries, where the system has none
WHEELS=$("$PYTHON" -c 'import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
print(":".join(str(p) for root in (spec.submodule_search_locations if spec else []) for p in pathlib.Path(root).glob("*/lib")))' 2> /dev/null)
export LD_LIBRARY_PATH="${WHEELS:+$WHEELS:}${LD_LIBRARY_PATH:-}"
# all of it ends within 10 minutes, the build included
exec "$PYTHON" bench/gpu/run.py "$SET" --out "$OUT" --budget $((575 - SECONDS)) "$@"
