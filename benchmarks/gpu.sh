#!/usr/bin/env bash
# What needs a GPU, in one call: the tests that are skipped without one, and sampling with CUDA graphs.
# It needs PyTorch, pytest and what the library imports, neither Snakemake nor DVC.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -m pytest -q -p no:cacheprovider tests/solvers/test_cuda_graph.py
python benchmarks/cuda_graphs.py
