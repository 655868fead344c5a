#!/usr/bin/env bash
# One process a card, started and restarted by torchrun. On each node:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 CARDS=8 bash configs/cluster/torchrun.sh
#
# Without variables: one process on this machine. `--no-python` starts a program that is none of Python's. With
# `--resume auto` a run that torchrun starts again goes on from its last checkpoint, bit for bit.
set -euo pipefail
: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29400}" "${CARDS:=1}"
: "${PROGRAM:=xray-qwen3vl}" "${CONFIG:=configs/tiny.toml}" "${OUTPUT_DIR:=artifacts/cluster}"

# NNODES here counts nodes for torchrun; its processes get RANK, LOCAL_RANK and WORLD_SIZE.
nodes=$NNODES rank=$NODE_RANK
unset NNODES NODE_RANK
exec torchrun --nnodes="$nodes" --node-rank="$rank" --nproc-per-node="$CARDS" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=3 --no-python \
    "$PROGRAM" train --config "$CONFIG" --output-dir "$OUTPUT_DIR" --no-tui --resume auto "$@"
