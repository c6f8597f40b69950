#!/usr/bin/env bash
# The paper's finding in small, offline: bash scripts/demo.sh [more flags for every run]
# Bias terms alone do nearly what all parameters do; a frozen encoder, or one that was never
# pre-trained, does not. Toy language and tiny BERT: see examples/make_examples.py.
set -euo pipefail
source "$(dirname "$0")/environment.sh" requirements.txt
rm -rf out/demo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # so small a model gains nothing from more
extra=("$@")

run() { # name of the output folder, then the flags that differ
    local output=out/demo/$1
    shift
    set -- run_glue.py --output-path "$output" --task-name cola --data-dir examples/glue \
        --model-name examples/tiny_bert --evaluation-frequency 4 "$@" ${extra[@]+"${extra[@]}"}
    printf '\n$ python %s\n' "$*"
    $PYTHON "$@"
}

run bitfit --fine-tune-type bitfit --learning-rate 3e-3 --epochs 24
run full_ft --fine-tune-type full_ft --learning-rate 3e-4 --epochs 8
run frozen --fine-tune-type frozen --learning-rate 1e-2 --epochs 24
run random_encoder --fine-tune-type bitfit --learning-rate 3e-3 --epochs 8 --random-encoder

set -- scripts/compare.py out/demo/{full_ft,bitfit,frozen,random_encoder} --plot out/demo/methods.png
printf '\n$ python %s\n' "$*"
$PYTHON "$@"
