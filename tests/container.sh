#!/usr/bin/env bash
# The Dockerfile without docker: builds from the files that .dockerignore lets through, then runs the last stage's
# commands in a fresh Debian below a folder, as its user, with its environment, health check and stop signal.
#
#   sudo tests/container.sh             builds with cargo install, then the rest
#   sudo tests/container.sh PROGRAM     the rest with a program that is there
#
# Needs root for chroot, debootstrap, python3, and for the build cargo. XRAY_ROOTFS names a Debian to start from.
set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
dockerfile="$repository/Dockerfile"
# Below the repository, whose cargo settings then count for the copy too.
mkdir -p "$repository/target"
scratch="$(mktemp -d "$repository/target/container.XXXXXX")"
server=""

finish() {
    local code=$?
    [[ -n "$server" ]] && kill "$server" 2>/dev/null
    umount "$scratch/root/proc" 2>/dev/null || true
    rm -rf --one-file-system "$scratch"
    ((code == 0)) || echo "FAILED" >&2
}
trap finish EXIT

fail() {
    echo "error: $*" >&2
    exit 1
}

# Instructions of the last stage, one a line, with continued lines joined.
last_stage() {
    sed -e '/^#/d' -e '/^[[:space:]]*$/d' "$dockerfile" | sed -e ':a' -e '/\\$/N; s/\\\n[[:space:]]*/ /; ta' |
        awk '/^FROM /{stage = ""} {stage = stage $0 "\n"} END {printf "%s", stage}'
}

# json_list INSTRUCTION: the words of `[...]` at its end, one a line.
json_list() {
    python3 -c 'import json, sys; print("\n".join(json.loads(sys.argv[1][sys.argv[1].index("["):])))' "$1"
}

# What the build stage copies.
build_context() {
    mkdir "$scratch/src"
    local path
    while read -r path; do
        (cd "$repository" && cp --parents -r "$path" "$scratch/src")
    done < <(sed -n 's/^!//p' "$repository/.dockerignore")
}

program="${1:-}"
if [[ -z "$program" ]]; then
    build_context
    grep -q 'cargo install --path . --locked --root /out' "$dockerfile" || fail "the build stage has another command"
    (cd "$scratch/src" && XRAY_COMMIT=c0ffee123 \
        cargo install --path . --locked --root "$scratch/out" --target-dir "$repository/target")
    # The sources are not in the image: what the program takes from them has to be inside it.
    rm -rf "$scratch/src"
    program="$scratch/out/bin/xray-qwen3vl"
    "$program" --version | grep -q c0ffee123 || fail "the commit given to the build is not in --version"
fi

root="$scratch/root"
if [[ -n "${XRAY_ROOTFS:-}" ]]; then
    cp -a "$XRAY_ROOTFS" "$root"
else
    debootstrap --variant=minbase bookworm "$root" >"$scratch/debootstrap.log" || fail "$(tail -n 5 "$scratch/debootstrap.log")"
fi
mkdir -p "$root/proc" "$root/dev"
mount -t proc proc "$root/proc"

user=0:0 folder=/ health="" entry=() command=() environment=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
signal=TERM
while IFS= read -r line; do
    words="${line#* }"
    case "$line" in
    "FROM debian:"*) ;;
    "COPY --from=build "*)
        read -r _ _ source target <<<"$line"
        [[ "$source" == /out/bin/xray-qwen3vl ]] || fail "unknown: $line"
        install -D "$program" "$root$target"
        ;;
    "COPY "*)
        read -r _ source target <<<"$line"
        install -D -m 644 "$repository/$source" "$root$target"
        ;;
    "RUN "*) chroot "$root" sh -c "$words" ;;
    "USER "*) user="$words" ;;
    "WORKDIR "*) folder="$words" ;;
    "ENV "*) read -ra more <<<"$words" && environment+=("${more[@]}") ;;
    "HEALTHCHECK "*) health="$line" ;;
    "ENTRYPOINT "*) mapfile -t entry < <(json_list "$line") ;;
    "CMD "*) mapfile -t command < <(json_list "$line") ;;
    "STOPSIGNAL "*) signal="${words#SIG}" ;;
    "EXPOSE "* | "VOLUME "*) ;;
    *) fail "an instruction that this script does not know: $line" ;;
    esac
done < <(last_stage)
[[ -n "$health" && ${#entry[@]} -gt 0 && ${#command[@]} -gt 0 && "$user" != 0:* ]] || fail "an instruction is missing"

# inside COMMAND...: in the container, with what the image sets; `extra` is more of the environment.
extra=()
inside() {
    # shellcheck disable=SC2016 # for the shell inside
    exec chroot --userspec="$user" "$root" env -i "${environment[@]}" "${extra[@]}" \
        sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
}

echo "== the user"
[[ "$(inside id -u)" == "${user%%:*}" ]]
(inside touch /usr/local/bin/other) 2>/dev/null && fail "the user may write outside its folders"
(inside touch /runs/own /models/own)

echo "== a report, with nothing mounted"
report="$(inside "${entry[@]}" infer --device cpu)"
echo "$report"
[[ -n "$report" ]] || fail "infer printed nothing"
(inside "${entry[@]}" config show --set max_steps=3) | grep -q '^max_steps = 3$' || fail "no config inside"
(inside "${entry[@]}" check data/sample/val/samples.jsonl) | tail -n 1

echo "== a training run, a new cache, and its continuation"
train=("${entry[@]}" train --device cpu --no-tui --show 0)
keys=(--set eval_generate=0 --set val_data=phantom:12:0..8:house)
(inside "${train[@]}" --output-dir artifacts/run "${keys[@]}" --set max_steps=2) | tail -n 1
(inside "${train[@]}" --config configs/tiny-pretrain.toml --random-init --model model/tiny --output-dir artifacts/first \
    "${keys[@]}" --set max_steps=1) | tail -n 1
(inside rm -r /runs/.cache)
(inside "${train[@]}" --config artifacts/run/config.toml --resume auto --set max_steps=3) | tail -n 1
(inside "${entry[@]}" infer --device cpu --adapter artifacts/run/checkpoint-3)

echo "== a server without a key is refused"
code=0
message="$( (inside "${entry[@]}" "${command[@]}") 2>&1)" || code=$?
[[ $code == 2 && "$message" == *api-key* ]] || fail "exit code $code: $message"

echo "== the server"
mapfile -t check < <(json_list "$health")
extra=(XRAY_API_KEY=a-secret XRAY_PORT=17861)
(inside "${check[@]}") 2>/dev/null && fail "healthy before the start"
(inside "${entry[@]}" "${command[@]}" --device cpu) >"$scratch/serve.log" 2>&1 &
server=$!
for ((second = 0; ; second++)); do
    (inside "${check[@]}") 2>/dev/null && break
    if ((second == 60)) || ! kill -0 "$server" 2>/dev/null; then
        fail "not healthy: $(cat "$scratch/serve.log")"
    fi
    sleep 1
done
echo "healthy after $second s"
kill -s "$signal" "$server"
code=0
wait "$server" || code=$?
server=""
[[ $code == 0 ]] || fail "after SIG$signal the server ended with $code: $(cat "$scratch/serve.log")"
echo "all of it works"
