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
# reports anything in them, a test fails, or a run does not end within SECONDS_A_RUN (120).
set -u

binary=$(realpath "${1:?the test binary}")
shift
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck initcheck racecheck)
limit=${SECONDS_A_RUN:-120}

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
# An allocation for every tensor, in place of pages that many share; kernels are compiled once for all tools.
printf '[memory]\npersistent_memory = "enforced"\n[compilation]\ncache = { file = "%s" }\n' "$run" >cubecl.toml
export XRAY_CUDA_SMALL=1 RUST_BACKTRACE=0

# Each operation of accelerate::cuda, then whole models. Racecheck follows every access to shared memory:
# whole models take it too long, and their kernels are those of the single operations.
operations=(norms rotation pointwise matmuls::products_of_f32 matmuls::products matmuls::adapters attention
    optimizer loss models::decoding)
tests=("${operations[@]/#/accelerate::cuda::tests::}")
# Quantised weights in fragment order.
fragments=(arranged_matrices_hold_the_same_values matmuls_with_fragments)
tests+=("${fragments[@]/#/accelerate::cuda::fragments::tests::}")
tests+=(accelerate::cuda::tests::models::decoding_with_quantised_weights)
whole=(train::cuda_unwritten_tests::nothing_unwritten_reaches_inference
    train::cuda_unwritten_tests::nothing_unwritten_reaches_the_serving_step
    train::cuda_unwritten_tests::nothing_unwritten_reaches_a_packed_training_step)

# Compiles the kernels, so that the tools do not watch the compiler.
"$binary" --exact --ignored --test-threads 1 "${tests[@]}" "${whole[@]}" >"$logs/plain.log" 2>&1
plain=$?
if [ $plain -ne 0 ]; then
    tail -n 40 "$logs/plain.log"
    echo "the tests fail, or find no GPU, without any tool" >&2
    exit 1
fi

# Initcheck names Burn's own copies and products as well, which are not judged here; that nothing unwritten
# reaches a result is what train::cuda_unwritten_tests show.
burns='copy_kernel|matmul_entry|kernel_'

failed=0
filter=()
# tool, label, tests: runs them under the tool and says what it found.
check() {
    local tool=$1 label=$2 log="$logs/$1-$2.log" started=$SECONDS
    shift 2
    timeout "$limit" "$sanitizer" --tool "$tool" --print-limit 200000 "${filter[@]}" \
        "$binary" --exact --ignored --test-threads 1 "$@" >"$log" 2>&1
    local code=$? found
    # The place of each finding: the line behind its headline.
    found=$(grep -E '^=+ +at ' "$log" | sed -E 's/^=+ +at //; s/[+(].*//' | sort | uniq -c | sort -rn)
    local ours
    ours=$(echo "$found" | grep -vE "^ *[0-9]+ ($burns)" | grep -c .)
    local result
    result=$(grep -oE 'test result: [a-zA-Z]+\. [0-9]+ passed; [0-9]+ failed' "$log" | tail -n 1)
    echo "$tool $label: ${result:-no result}; $ours places in this program's kernels; $((SECONDS - started)) s, exit $code"
    echo "$found" | head -n 12
    local clean='SUMMARY: 0 (errors|hazards)'
    # Initcheck's own count has Burn's kernels in it.
    [ "$tool" = initcheck ] && clean='SUMMARY'
    if [ "$ours" -ne 0 ] || [[ $result != *" 0 failed" ]] || ! grep -qE "$clean" "$log"; then
        failed=1
        grep -m 12 -E 'Invalid|hazard|panicked' "$log"
    fi
}

for tool in "${tools[@]}"; do
    if [ "$tool" = racecheck ]; then
        # Each alone: it is slow, and what one took too long for should not hide the others. The launches of
        # a graph are watched as one, so they come one by one.
        export XRAY_CUDA_NO_GRAPH=1
        for name in "${operations[@]}"; do
            [ "$name" = models::decoding ] || check racecheck "$name" "accelerate::cuda::tests::$name"
        done
        for name in "${fragments[@]}"; do
            check racecheck "$name" "accelerate::cuda::fragments::tests::$name"
        done
        # Watched whole, this test does not end: its kernels are watched one by one.
        for kernel in rms_norm gemv skinny EMBED HEADS attention_decode PICK CHOOSE; do
            filter=(--kernel-name "kernel_substring=$kernel")
            check racecheck "decoding-$kernel" accelerate::cuda::tests::models::decoding
        done
        filter=()
        # The products of Ampere.
        export XRAY_CUDA_SM80=1
        check racecheck products-sm80 accelerate::cuda::tests::matmuls::products
        unset XRAY_CUDA_NO_GRAPH XRAY_CUDA_SM80
    else
        check "$tool" all "${tests[@]}" "${whole[@]}"
        export XRAY_CUDA_SM80=1
        check "$tool" products-sm80 accelerate::cuda::tests::matmuls::products
        unset XRAY_CUDA_SM80
    fi
done
echo "logs: $logs"
exit $failed
