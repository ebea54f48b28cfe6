#!/usr/bin/env bash
# Rung 7: one command on a machine with one or more NVIDIA GPUs and the CUDA toolkit.
#   bench/gpu.sh            builds, checks every kernel and the step in every mode, times them beside cuBLASLt, NCCL and torch
# Writes bench/results/gpu_<name>_<date>.md and leaves with the number of checks that failed. Without a GPU: says so, status 2.
# Python (for torch's BLAS and the linear pair): PYTHON=..., else .venv, else python3; without torch those parts are left out and named.
set -uo pipefail
cd "$(dirname "$0")/.."
command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1 || { echo "gpu.sh: no NVIDIA GPU here, nothing was run" >&2; exit 2; }
command -v nvcc > /dev/null || { echo "gpu.sh: no nvcc on PATH: install the CUDA toolkit" >&2; exit 2; }

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
GPUS=$(nvidia-smi -L | wc -l)
NAME=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-' | tr -cd '[:alnum:]-' | tr '[:upper:]' '[:lower:]')
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
REPORT="$OUT/gpu_${GPUS}x${NAME}_$(date +%F).md"
BUILD=build/gpu
failed=0
ROUNDS=${ROUNDS:-20}
CAPABILITY=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '.')
ARCH=$([ "$CAPABILITY" -ge 90 ] && [ "$CAPABILITY" -lt 100 ] && echo '80;90a' || echo 80)

say() { echo "$@" | tee -a "$REPORT"; }
# Runs a command, shows it and its table; counts it as failed where it fails.
part() {
  say ""; say "\`$*\`"; say '```'
  if "$@" >> "$REPORT" 2>&1; then say '```'; else say '```'; say "**FAILED** (status $?)"; failed=$((failed + 1)); fi
}

: > "$REPORT"
say "# gingham on $GPUS x $NAME"
say "commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown), $(date -u +%FT%TZ), $(nvcc --version | grep -o 'V[0-9.]*'), driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)"
say ""; say "## Build"
say '```'
(cmake -S . -B $BUILD -DWITH_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$ARCH" -DGINGHAM_BINDING=OFF -DGINGHAM_OUTPUT="$PWD/$BUILD" &&
  cmake --build $BUILD --target microbench --parallel "$(nproc)") > $BUILD.log 2>&1
status=$?
tail -n 3 $BUILD.log | tee -a "$REPORT"
say '```'
[ $status -eq 0 ] || { say "the build failed, see $BUILD.log"; exit 1; }

BENCH=$BUILD/bin/microbench
TORCH_BLAS=$("$PYTHON" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parent / "lib" / "libtorch_cpu.so")' 2> /dev/null)
export GINGHAM_BLAS=${GINGHAM_BLAS:-$([ -e "$TORCH_BLAS" ] && echo "$TORCH_BLAS" || echo plain)}
# the wheels' libraries, where the system has none
WHEELS=$("$PYTHON" -c 'import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
print(":".join(str(p) for root in (spec.submodule_search_locations if spec else []) for p in pathlib.Path(root).glob("*/lib")))' 2> /dev/null)
export LD_LIBRARY_PATH="${WHEELS:+$WHEELS:}${LD_LIBRARY_PATH:-}"

say ""; say "## Checks: every kernel beside its CPU twin"
part $BENCH kernels --device cuda --transport copy --as threads
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck; do
    part compute-sanitizer --tool $tool --error-exitcode 1 $BENCH kernels --device cuda --transport copy --as threads
  done
else
  say "compute-sanitizer is not installed: memcheck, racecheck and synccheck were not run"
fi

say ""; say "## Checks: the step on every mode, exact integers, bytes equal to the formula"
say "Ranks are threads over device copies (transport copy): any number of them on $GPUS GPU(s)."
for grid in 1,2,1 2,2,1 1,4,1 2,2,2 4,2,1 3,2,1; do
  for extra in "--slices 1" "--slices 3" "--slices 3 --swapped"; do
    part $BENCH all --check --grid $grid --shape 515,387,261 --rounds 3 --device cuda --transport copy --as threads $extra
  done
done
if [ "$GPUS" -gt 1 ]; then
  say "Ranks are processes over NCCL, one a GPU."
  for grid in 1,2,1 2,1,1 1,4,1 2,2,1 2,2,2 4,2,1; do
    IFS=, read -r pm pn pk <<< "$grid"
    [ $((pm * pn * pk)) -le "$GPUS" ] && part $BENCH all --check --grid $grid --shape 515,387,261 --rounds 3 --slices 2 --device cuda --transport nccl
  done
else
  say "One GPU: NCCL refuses two ranks on it, so that the NCCL transport was NOT run here."
fi

say ""; say "## Checks: attention over a ring, forward and backward, bytes equal to the formula"
for dtype in float32 bfloat16 float16 float64; do
  for shape in 515,64,4 130,128,2 37,20,3; do
    part $BENCH attention --check --ranks 4 --shape $shape --dtype $dtype --rounds 3 --device cuda --transport copy --as threads
  done
done
[ "$GPUS" -gt 1 ] && part $BENCH attention --check --ranks "$GPUS" --shape 515,64,4 --dtype bfloat16 --rounds 3 --device cuda --transport nccl

say ""; say "## Attention, causal, one rank and a ring (useful flops: half of the square)"
for dtype in bfloat16 float32; do
  for shape in 8192,64,16 8192,128,16; do
    for ranks in 1 4; do
      part $BENCH attention --ranks $ranks --shape $shape --dtype $dtype --rounds "$ROUNDS" --device cuda --transport copy --as threads
    done
  done
done

say ""; say "## Products: gingham, then cuBLASLt (GFLOP/s)"
for dtype in bfloat16 float16 float32 float64; do
  for n in 1024 4096 8192; do
    [ "$dtype" = float64 ] && [ "$n" = 8192 ] && continue
    for library in gingham cublaslt; do
      part $BENCH gemm --shape $n,$n,$n --dtype $dtype --library $library --rounds "$ROUNDS" --device cuda --transport copy --as threads
    done
  done
done
for library in gingham cublaslt; do
  part $BENCH gemm --shape 4096,4096,4096 --tf32 --library $library --rounds "$ROUNDS" --device cuda --transport copy --as threads
done
part env GINGHAM_SM90=0 $BENCH gemm --shape 4096,4096,4096 --dtype bfloat16 --rounds "$ROUNDS" --device cuda --transport copy --as threads

say ""; say "## One step on the grids, ranks sharing $GPUS GPU(s)"
for grid in 1,1,1 2,2,1 2,2,2; do
  part $BENCH backward --grid $grid --sizes 4096 --slices 4 --rounds "$ROUNDS" --device cuda --transport copy --as threads
done

if [ "$GPUS" -gt 1 ]; then
  say ""; say "## Rings beside NCCL's own collectives"
  for name in all_gather reduce_scatter all_reduce; do
    for library in gingham nccl; do
      part $BENCH $name --ranks "$GPUS" --sizes $((GPUS << 20)),$((GPUS << 24)) --library $library --rounds "$ROUNDS" --device cuda --transport nccl
    done
  done
fi

say ""; say "## The linear pair beside torch"
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  part "$PYTHON" bench/gpu_pair.py
else
  say "$PYTHON has no torch with CUDA: not run"
fi

say ""; say "$failed part(s) failed"
echo "$REPORT"
exit "$failed"
