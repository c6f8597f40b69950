#!/usr/bin/env bash
# The paper's grid on one task: bash scripts/sweep_learning_rates.sh TASK [flags of run_glue.py]
# Four learning rates x five seeds of BitFit at batch size 16, all in one pass. (Grid transcribed,
# check against the paper.) Flags given here replace the script's own: --seed 0 1, -f full_ft
# --learning-rate 1e-5 2e-5 3e-5 5e-5, --output-path, ...
set -euo pipefail
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
source "$(dirname "$0")/environment.sh" requirements.txt
task=$1
shift
set -- run_glue.py --task-name "$task" --output-path "out/sweep-$task" --fine-tune-type bitfit \
    --learning-rate 1e-4 4e-4 7e-4 1e-3 --seed 0 1 2 3 4 --batch-size 16 "$@"
printf '$ python %s\n' "$*"
$PYTHON "$@"
