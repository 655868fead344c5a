#!/usr/bin/env bash
# Kernel tests under NVIDIA's compute-sanitizer: memcheck, initcheck and racecheck, one after another.
#
# usage: tests/gpu/sanitize.sh TEST_BINARY [TOOL]…
#   TEST_BINARY  what `cargo test --release --features cuda --lib --no-run` names; it may have been built
#                on another machine
#   TOOL         memcheck, initcheck, racecheck; all three without
#
# Needs a GPU that the tools can watch. Every test runs its first two cases only; every tensor gets an
# allocation of its own, so that the tools see where it ends and what of it was written. Fails when a tool
# reports anything, a test fails, or a tool does not end within SECONDS_A_TOOL (300).
set -u

binary=$(realpath "${1:?the test binary}")
shift
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck initcheck racecheck)
limit=${SECONDS_A_TOOL:-300}

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ ! -x "$sanitizer" ]; then
    echo "compute-sanitizer is not installed; it comes with the CUDA toolkit" >&2
    exit 2
fi

logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
cd "$run" || exit 2
# The kernels of this program; Burn's own stand beside them in the tests as what is compared with.
kernels=(gemm_ attention_ rms_norm layer_norm rotate_heads split_and_rotate gated gelu_ LOW_RANK_ SUM_
    SCALE_CAST MASK_FILL product_f32 softmax_loss loss_sums ADAMW SQUARE_SUMS CLIP_SCALE append_to_cache
    pages gemv skinny EMBED HEADS SHRINK PICK CHOOSE)
only=()
for name in "${kernels[@]}"; do only+=(--kernel-name "kernel_substring=$name"); done

# An allocation for every tensor, in place of pages that many share; kernels are compiled once for all tools.
printf '[memory]\npersistent_memory = "enforced"\n[compilation]\ncache = { file = "%s" }\n' "$run" >cubecl.toml
export XRAY_CUDA_SMALL=1 RUST_BACKTRACE=0

# Each operation of kernels::cuda, then whole models. Racecheck follows every access to shared memory:
# whole models take it too long, and their kernels are those of the single operations.
operations=(norms rotation pointwise products_of_f32 products adapters attention optimizer loss decoding)
tests=("${operations[@]/#/kernels::cuda::tests::}")
whole=(kernels::cuda::unwritten_tests::nothing_unwritten_reaches_the_serving_step
    kernels::cuda::unwritten_tests::nothing_unwritten_reaches_a_packed_training_step)

# Compiles the kernels, so that the tools do not watch the compiler.
"$binary" --exact --test-threads 1 "${tests[@]}" "${whole[@]}" >"$logs/plain.log" 2>&1
plain=$?
if [ $plain -ne 0 ] || grep -q SKIPPED "$logs/plain.log"; then
    tail -n 40 "$logs/plain.log"
    echo "the tests fail, or find no GPU, without any tool" >&2
    exit 1
fi

failed=0
for tool in "${tools[@]}"; do
    names=("${tests[@]}")
    [ "$tool" = racecheck ] || names+=("${whole[@]}")
    log="$logs/$tool.log"
    started=$SECONDS
    # Launches of a graph are watched as one: racecheck gets them one by one.
    [ "$tool" = racecheck ] && export XRAY_CUDA_NO_GRAPH=1
    timeout "$limit" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 1000 "${only[@]}" \
        "$binary" --exact --test-threads 1 "${names[@]}" >"$log" 2>&1
    code=$?
    summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1)
    result=$(grep -E '^test result' "$log" | tail -n 1)
    echo "$tool: ${summary:-no summary}; ${result:-no result}; $((SECONDS - started)) s, exit $code"
    if [ $code -ne 0 ]; then
        failed=1
        grep -E '^=+ +at ' "$log" | sed 's/+0x.*//' | sort | uniq -c | sort -rn | head -n 10
        grep -E 'Invalid|Uninitialized|Race|hazard|FAIL|panicked' "$log" | sort | uniq -c | sort -rn | head -n 10
        grep -m 5 -A 3 -E 'Invalid|Uninitialized|hazard' "$log"
    fi
done
echo "logs: $logs"
exit $failed
