#!/usr/bin/env bash
# gpu.sh FOLDER [PART...]   Measure what is worth measuring on one GPU, in parts of at most ten minutes each.
#
#   tests        the tests that need a GPU
#   training     steps per second and model FLOP utilization of both stages, in float32, tf32 and bf16
#   sampling     solvers with and without CUDA graphs
#   mnist_small  a training of this model, both stages; it saves its state when its time is up, and the same call resumes it
#
# All parts by default. FOLDER gets what each part prints, and the models. Needs PyTorch, pytest and what the library
# imports, neither Snakemake nor DVC. DATA is a store of MNIST that exists; DEVICE, LIMIT (seconds) and STEPS try it out.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- tests training sampling mnist_small
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
device=${DEVICE:-cuda} limit=${LIMIT:-570} data=${DATA:-data/mnist} failed=0

# Run a command until the part's time is up; a failure does not keep the other parts from running.
run() {
    local left=$((limit - SECONDS)) status=0
    [ "$left" -gt 0 ] || return 0
    timeout --preserve-status --kill-after=25 "$left" "$@" || status=$?
    case $status in
        0) ;;
        75 | 143) echo "== out of time (exit code $status): $*"; SECONDS=$limit ;;
        *) echo "== exit code $status: $*"; failed=1 ;;
    esac
}

# A stage of mnist_small with the configuration that the workflow would write, unless it is done.
stage() {
    local name=$1 out=$2
    shift 2
    [ ! -e "$out/model.safetensors" ] || return 0
    python -c 'import sys
from lsgm.params import load_params
print(load_params("params.yaml").freeze(sys.argv[1], "mnist_small").model_dump_json())' "$name" > "$folder/$name.json"
    run python -m lsgm.cli "$name" --config "$folder/$name.json" --data "$data" --out "$out" --device "$device" "$@"
}

part() {
    case $1 in
        tests) run python -m pytest -q -p no:cacheprovider -m cuda tests/solvers tests/data ;;
        training)
            for precision in fp32 tf32 bf16; do
                run python benchmarks/training.py --data "$data" --device "$device" --models demo mnist_small \
                    --steps "${STEPS:-30}" --options precision=$precision
            done
            ;;
        sampling) run python benchmarks/cuda_graphs.py ;;
        mnist_small)
            stage pretrain "$folder/vae"
            [ ! -e "$folder/vae/model.safetensors" ] || stage train "$folder/lsgm" --vae "$folder/vae"
            ;;
        *) echo "unknown part: $1" >&2; exit 2 ;;
    esac
}

if [[ ! -e $data/manifest.json && " $* " =~ " training "|" mnist_small "|" tests " ]]; then
    python -m lsgm.cli prepare --config examples/mnist.json --out "$data"
fi
for name; do
    echo "== $name"
    SECONDS=0 # bash counts on from here
    part "$name" > >(tee -a "$folder/$name.txt") 2>&1
done
exit "$failed"
