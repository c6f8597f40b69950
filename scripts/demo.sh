#!/usr/bin/env bash
# The paper's finding in small, offline: bash scripts/demo.sh [more flags for every run]
# Bias terms alone do nearly what all parameters do; a frozen encoder, or one that was never
# pre-trained, does not. Toy language and tiny BERT: see examples/make_examples.py.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
rm -rf out/demo
extra=("$@")

run() { # name, then the flags
    local name=$1
    shift
    set -- run_glue.py --output-path "out/demo/$name" --task-name cola \
        --model-name examples/tiny_bert --data-dir examples/glue --gpu-device cpu "$@" ${extra[@]+"${extra[@]}"}
    printf '\n$ python %s\n' "$*"
    $PYTHON "$@"
}

run bitfit --fine-tune-type bitfit --learning-rate 2e-3
run full_ft --fine-tune-type full_ft --learning-rate 3e-4
run frozen --fine-tune-type frozen --learning-rate 5e-3
run random_encoder --fine-tune-type bitfit --learning-rate 2e-3 --random-encoder

printf '\n$ python scripts/compare.py out/demo/*\n'
$PYTHON scripts/compare.py out/demo/{full_ft,bitfit,frozen,random_encoder}
