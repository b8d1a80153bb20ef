#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, from the repository root: tests, measurement and benchmarks, results into $1.
set -uo pipefail
out="${1:?where to put the results}"
python="${PYTHON:-.venv/bin/python}"
mkdir -p "$out"
nvidia-smi > "$out/device.txt"
git rev-parse HEAD > "$out/commit.txt" 2>/dev/null || true
failed=0
"$python" -m pytest -q -m gpu > "$out/gpu-tests.txt" 2>&1 || failed=1
"$python" -m pytest -q tests/test_triton.py tests/test_cfg_step.py > "$out/kernel-tests.txt" 2>&1 || failed=1
"$python" -m engine.kernels.measure --out "$out/measured.json" > "$out/measure.txt" 2>&1 || failed=1
"$python" -m pytest benchmarks --benchmark-json "$out/benchmarks.json" > "$out/benchmarks.txt" 2>&1 || failed=1
tail -n 3 "$out"/*.txt
exit "$failed"
