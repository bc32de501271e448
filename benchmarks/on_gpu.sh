#!/usr/bin/env bash
# What a GPU has to show, in under eight minutes and without a network:
#
#     benchmarks/on_gpu.sh [--quick] [FOLDER]
#
# It needs a python3 with JAX, optax, pytest and scikit-learn; torch is compared where it is
# installed. FOLDER ($OUT by default, or else on_gpu) gets a text and the figures of each part,
# and summary.txt and summary.json with the device's name. A part that fails or takes too long
# does not stop the others. The exit status is 0 where all parts went well. With --quick, small
# sizes show on any machine that everything runs.
set -uo pipefail

quick=()
patience=1
if [[ ${1:-} == --quick ]]; then
    quick=(--quick)
    # The limits are a GPU's, and the machine may be busy.
    patience=10
    shift
fi
out=${1:-${OUT:-on_gpu}}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH=$PWD
# Several processes share the device, and torch needs a part of its memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

device=$(python3 -c 'import jax; print(jax.devices()[0].device_kind)') || exit 2
platform=$(python3 -c 'import jax; print(jax.default_backend().replace("gpu", "cuda"))')
{
    echo "device: $device"
    printf '%-12s %-9s %s\n' part status seconds
} | tee "$out/summary.txt"

failed=0
# part NAME LIMIT COMMAND...: seconds that the command may take, and what it wrote.
part() {
    local name=$1 limit=$2 start=$SECONDS status=0 said=ok
    shift 2
    timeout $((limit * patience)) "$@" > "$out/$name.txt" 2>&1 || status=$?
    ((status == 0)) || failed=1
    ((status == 0)) || said="failed:$status"
    ((status != 124)) || said=too-long
    printf '%-12s %-9s %s\n' "$name" "$said" $((SECONDS - start)) | tee -a "$out/summary.txt"
}

# The part of the suite whose results a device can change: the contract, methods against NumPy,
# the largest and smallest numbers, and gradients of examples. What needs eight devices, a
# package that may be missing, or a CPU's exact program, is left out.
tests=(tests/test_contract.py tests/methods tests/test_range.py tests/test_per_example.py)
chosen='(test_contract and not (eight or wrappers or multi_steps or apply_if_finite or optimizer_of
    or extra_arguments)) or numpy or test_range or test_per_example'
shares=8
# Quick: one test in eighty, on one core or two.
if ((${#quick[@]})); then shares=80; fi

contract() {
    local share running=() status=0
    for ((share = 1; share <= (shares > 8 ? 1 : shares); share++)); do
        CLIPAX_TEST_PLATFORM=$platform CLIPAX_TEST_SHARE=$share/$shares \
            python3 -m pytest -q -p no:cacheprovider -W default -k "${chosen//$'\n'/ }" "${tests[@]}" &
        running+=($!)
    done
    for share in "${running[@]}"; do wait "$share" || status=1; done
    return $status
}
export -f contract
export platform shares chosen

works() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" python3 -m benchmarks "${quick[@]}" --output "$out/$name" "$@"
}

# Functions and arrays are not exported together.
part contract 150 bash -c "tests=(${tests[*]}); contract"
works step_leaf 90 --only step --trees "one leaf" --optimizers adam
works step_gpt2 90 --only step --trees "GPT-2 small" --optimizers adam \
    --groups global leaf unit wrappers
works clip 45 --only clip --trees "one leaf" "GPT-2 small" --groups global leaf
works memory 45 --only memory --trees "one leaf" --dtypes float32
part per_example 60 python3 -m benchmarks.per_example "${quick[@]}" --only mlp transformer \
    --output "$out/per_example.json"

python3 - "$out" "$device" << 'END'
"""One file with the figures of all parts that left some."""
import json
import sys
from pathlib import Path

out, device = Path(sys.argv[1]), sys.argv[2]
lines = [line.split() for line in (out / "summary.txt").read_text().splitlines()[2:]]
parts = {name: {"status": status, "seconds": int(seconds)} for name, status, seconds in lines}
for name, part in parts.items():
    for path in (out / name / "results.json", out / f"{name}.json"):
        if path.exists():
            part["results"] = json.loads(path.read_text())
(out / "summary.json").write_text(json.dumps({"device": device, "parts": parts}, indent=1) + "\n")
END
exit $failed
