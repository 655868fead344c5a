#!/usr/bin/env bash
# Plain ssh: one process a host, the first host leads. All hosts have the program, the configuration, the model and the
# data under the same names; the folder of the run may be seen by the first alone.
#
#   bash configs/cluster/ssh.sh 10.0.0.1 10.0.0.2 -- --config configs/openi-lora.toml --output-dir artifacts/run
#
# `localhost localhost` tries it on one machine without ssh.
set -euo pipefail
: "${PROGRAM:=xray-qwen3vl}" "${PORT:=29500}"
hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do hosts+=("$1"); shift; done
[ $# -eq 0 ] || shift
if [ "${#hosts[@]}" -lt 2 ]; then
    echo "usage: $0 HOST HOST [HOST ..] -- arguments of train" >&2
    exit 2
fi
key=${XRAY_CLUSTER_KEY:-$(head -c 32 /dev/urandom | base64)}
folder=$PWD
arguments=$(printf '%q ' train --no-tui --resume auto "$@")

pids=()
# Ctrl-C, or a node that failed, ends all.
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM EXIT
for rank in "${!hosts[@]}"; do
    own="--nnodes ${#hosts[@]} --node-rank $rank --master ${hosts[0]}:$PORT"
    # The secret goes through standard input: a list of processes shows arguments.
    remote="cd $(printf %q "$folder") && read -r XRAY_CLUSTER_KEY && export XRAY_CLUSTER_KEY && exec $PROGRAM $arguments $own"
    if [ "${hosts[$rank]}" = localhost ]; then
        bash -c "$remote" <<<"$key" &
    else
        ssh -o BatchMode=yes "${hosts[$rank]}" "$remote" <<<"$key" &
    fi
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
