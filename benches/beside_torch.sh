#!/usr/bin/env bash
# This program and PyTorch on one card, one after the other in one go, so that both meet the same machine.
#
#   benches/beside_torch.sh OUTPUT_DIR [TORCH_BENCH_DIR]
#
# TORCH_BENCH_DIR (or the variable of that name; `benches/torch` here) holds Python scripts; each is run as it is and prints its
# own figures. Without it only this program is measured. Variables:
#   XRAY_BIN     the program            [target/release/xray-qwen3vl]
#   XRAY_SIZE    size of the random weights: 8b, 4b, 2b, tiny [8b]
#   XRAY_DEVICE  as --device takes it   [cuda:0]
#   XRAY_DTYPE   as --dtype takes it    [the device's default]
#   XRAY_TABLE   1: list the operations as well
#   PYTHON       interpreter            [python3]
# Every command's output is kept in OUTPUT_DIR, beside what machine and commit it was. A command that fails
# is named at the end and makes the exit code 1; the others are run all the same.
set -uo pipefail

out="${1:?usage: benches/beside_torch.sh OUTPUT_DIR [TORCH_BENCH_DIR]}"
torch_dir="${2:-${TORCH_BENCH_DIR:-}}"
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
program="${XRAY_BIN:-$repository/target/release/xray-qwen3vl}"
python="${PYTHON:-python3}"
common=(--random-weights "${XRAY_SIZE:-8b}" --device "${XRAY_DEVICE:-cuda:0}")
[[ -n "${XRAY_DTYPE:-}" ]] && common+=(--dtype "$XRAY_DTYPE")
[[ "${XRAY_TABLE:-0}" == 1 ]] && common+=(--table)

if [[ ! -x "$program" ]]; then
    echo "\`$program\` is not a program; build it with: cargo build --release --features cuda" >&2
    exit 2
fi
if [[ -n "$torch_dir" && ! -d "$torch_dir" ]]; then
    echo "\`$torch_dir\` is not a folder; expected one with Python scripts" >&2
    exit 2
fi
mkdir -p "$out" || exit 2
if [[ -n "$(ls -A "$out")" ]]; then
    echo "\`$out\` is not empty; figures of two runs must not mix" >&2
    exit 2
fi

failed=()

# keep NAME COMMAND [ARGUMENT...]: runs a command, shows its output and keeps it in NAME.log.
keep() {
    local name="$1"
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    local started=$SECONDS
    "$@" 2>&1 | tee "$out/$name.log"
    local code="${PIPESTATUS[0]}"
    printf -- '-- %s: exit code %s after %s s\n' "$name" "$code" "$((SECONDS - started))" \
        | tee -a "$out/$name.log"
    ((code == 0)) || failed+=("$name")
}

# ours NAME KIND [ARGUMENT...]: one measurement of this program, records beside the table.
ours() {
    local name="$1" kind="$2"
    shift 2
    keep "xray-$name" "$program" bench "$kind" "${common[@]}" "$@" --json "$out/xray-$name.jsonl"
}

{
    date -u +%FT%TZ
    git -C "$repository" describe --always --dirty --abbrev=12 2>/dev/null || echo "no commit known"
    "$program" --version
    uname -srm
    grep -m1 'model name' /proc/cpuinfo
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader \
        2>/dev/null || echo "no nvidia-smi"
} | tee "$out/machine.txt"

# Prefill first: its first call is what a user with empty kernel caches waits for.
ours prefill prefill
ours load load
ours vision vision
ours decode decode --batch 1,8,32
ours train-published train --batch 1
ours train-packed train --batch 16 --packing
ours train-packed-kept train --batch 16 --packing --no-recompute
ours prefill-mixed prefill --mixed
ours decode-mixed decode --mixed --batch 1,8,32
ours train-mixed train --mixed --batch 16 --packing

if [[ -n "$torch_dir" ]]; then
    for script in "$torch_dir"/*.py; do
        [[ -e "$script" ]] || { echo "\`$torch_dir\` holds no Python script" >&2; failed+=(torch); break; }
        keep "$(basename "$script" .py)" "$python" "$script"
    done
fi

cat "$out"/xray-*.jsonl >"$out/all.jsonl" 2>/dev/null
printf '\noutput of all commands: %s\n' "$out"
if ((${#failed[@]} > 0)); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
