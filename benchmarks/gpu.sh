#!/usr/bin/env bash
# The first minutes on a GPU, unattended: checks, whole commands, times; the log is out/gpu/log.txt.
#
#     bash benchmarks/gpu.sh
#     bash benchmarks/gpu.sh small   # the same with a tiny model: on a CPU, to see that it runs
#
# Needs this repository, torch and transformers; with accelerate it also times Trainer. Ends with a
# table of all checks and status 1 if one failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
log=${OUT:-out/gpu}/log.txt
mkdir -p "$(dirname "$log")"
size=() steps=() jobs=() sweep=()
if [ "${1:-}" = small ]; then
    size=(--size tiny)
    steps=(--runs 1 2 --steps 3 --processes 2)
    jobs=(--jobs 2)
    sweep=(--size tiny --rows 64 --seeds 2)
fi

part() { # the seconds it may take, then the command
    echo "== $(date +%T) ${*:2}"
    timeout "$@" || echo "FAIL ${*:2}: status $?"
}
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null ||
        echo "no NVIDIA GPU"
    python3 -c 'import sys, torch, transformers
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda,
      "transformers", transformers.__version__)'
    part 150 python3 benchmarks/gpu_checks.py ${size[@]+"${size[@]}"} &
    part 200 python3 benchmarks/gpu_commands.py ${jobs[@]+"${jobs[@]}"}
    wait
    part 360 python3 benchmarks/gpu_times.py ${size[@]+"${size[@]}"} ${steps[@]+"${steps[@]}"}
    part 200 python3 benchmarks/gpu_sweep.py ${sweep[@]+"${sweep[@]}"}
    echo "== $(date +%T) end"
} 2>&1 | tee "$log"
echo
grep -E '^(ok  |FAIL) ' "$log"
if grep -q '^FAIL ' "$log"; then
    echo "FAILED, see $log"
    exit 1
fi
echo "all passed"
