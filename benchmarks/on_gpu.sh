#!/usr/bin/env bash
# Tests, measurements and benchmarks on a machine with an NVIDIA GPU; results go to OUT. Run it in the repository root.
#
#     bash benchmarks/on_gpu.sh OUT [tests|kernels|engine|peers|photos]...    default: all five, in this order
#
# Each part ends within ten minutes. photos trains on PHOTOS (MS-COCO captions layout) with AUTOENCODER and FEATURES
# (see `python -m benchmarks.experiments --help`), STEPS steps of each model.
set -uo pipefail
out="${1:?name the folder for the results}"
python="${PYTHON:-.venv/bin/python}"
failed=0

run() { # run NAME COMMAND...: writes its output to OUT/NAME.txt and prints the end of it; a part has 590 seconds
    local name="$1" left=$((590 - SECONDS)) status=0
    shift
    timeout "$((left > 1 ? left : 1))" "$@" > "$out/$name.txt" 2>&1 || status=$?
    tail -n 3 "$out/$name.txt"
    echo "$name: status $status after $SECONDS seconds of its part"
    [ "$status" -eq 0 ] || failed=1
}

tests() {
    run gpu-tests "$python" -m pytest -q -m gpu
    run kernel-tests "$python" -m pytest -q -m "not gpu" \
        tests/test_triton.py tests/test_philox.py tests/test_cfg_step.py
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck; do
            run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q \
                tests/test_triton.py -m "not gpu" -k "(and_its_gradient or table or step) and bfloat16"
        done
    else
        echo "compute-sanitizer: not installed; memcheck and racecheck did not run" | tee "$out/sanitizer.txt"
    fi
}

kernels() { # the measurement comes first: the later parts choose kernels by it
    run measure "$python" -m engine.kernels.measure --out kernels/measured.json
    cp kernels/measured.json "$out" || failed=1
    run kernels "$python" -m pytest benchmarks/test_kernels.py --benchmark-json "$out/results/kernels.json"
}

engine() {
    run roofline "$python" -m benchmarks.roofline
    run engine "$python" -m pytest benchmarks --ignore benchmarks/test_kernels.py --ignore benchmarks/test_peers.py \
        --benchmark-json "$out/results/engine.json"
}

peers() {
    run peers "$python" -m pytest benchmarks/test_peers.py --benchmark-json "$out/results/peers.json"
}

photos() {
    if [ -n "${PHOTOS:-}" ] && [ -n "${AUTOENCODER:-}" ] && [ -n "${FEATURES:-}" ]; then
        run photos "$python" -m benchmarks.experiments architecture --preset coco256 --size 128 --data "$PHOTOS" \
            --autoencoder "$AUTOENCODER" --features "$FEATURES" --steps "${STEPS:-200}" --batch 64 \
            --out "$out/runs" --results "$out/results"
    else
        echo "photos: skipped; set PHOTOS, AUTOENCODER and FEATURES to run it" | tee "$out/photos.txt"
    fi
    run report "$python" -m benchmarks.report --results "$out/results" --out "$out/RESULTS.md"
}

shift
[ $# -gt 0 ] || set -- tests kernels engine peers photos
for part in "$@"; do
    case "$part" in
        tests | kernels | engine | peers | photos) ;;
        *) echo "on_gpu.sh: '$part' is not a part; use tests, kernels, engine, peers or photos" >&2; exit 2 ;;
    esac
done
mkdir -p "$out/results"
nvidia-smi > "$out/device.txt" || failed=1
git rev-parse HEAD > "$out/commit.txt" || failed=1
for part in "$@"; do
    SECONDS=0
    "$part"
done
exit "$failed"
