#!/usr/bin/env bash
# Two NVIDIA GPUs as two processes (one a card, as torchrun starts them) and as two nodes that see each other only through
# sockets, beside one process with two threads: equal losses and adapters, and how fast each is.
#
# usage: tests/gpu/two_nodes.sh PROGRAM [MODEL_DIR]
#   PROGRAM    a release build with --features cuda
#   MODEL_DIR  folder with the 8B's config.json and tokenizer; made from the tiny model's tokenizer and
#              the published sizes without. Weights are random in any case.
#
# STEPS (20), LAYERS (all), PACKING (1024: 16 of the short samples fill a row), ACCUMULATION (6 such rows a card make a step as
# long as the recipe's), OUT (a temporary folder). NCCL has to be found (README, "Several GPUs").
set -euo pipefail

program=$(realpath "${1:?the program}")
model=${2:-}
steps=${STEPS:-20}
out=${OUT:-$(mktemp -d)}
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
cd "$root"

if [ -z "$model" ]; then
    model=$out/model
    mkdir -p "$model"
    cp model/tiny/{chat_template.jinja,generation_config.json,preprocessor_config.json,tokenizer.json,tokenizer_config.json} "$model"
    # The sizes of Qwen3-VL-8B-Instruct, with the special tokens of the tokenizer.
    python3 - "$model/config.json" "${LAYERS:-36}" <<'PY'
import json, sys
config = json.load(open("model/tiny/config.json"))
text, vision = config["text_config"], config["vision_config"]
text.update(hidden_size=4096, intermediate_size=12288, num_hidden_layers=int(sys.argv[2]), num_attention_heads=32,
            num_key_value_heads=8, head_dim=128)
vision.update(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096,
              deepstack_visual_indexes=[8, 16, 24], num_position_embeddings=2304)
scaling = text.get("rope_scaling") or {}
if "mrope_section" in scaling:
    scaling["mrope_section"] = [24, 20, 20]
config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
json.dump(config, open(sys.argv[1], "w"), indent=1)
PY
fi

common=(train --config configs/tiny.toml --model "$model" --random-init --no-tui --show 0 --dtype bf16
    --set "max_steps=$steps" --set save_steps=0 --set eval_steps=0 --set eval_generate=0 --set logging_steps=1
    --set 'val_data="data/sample/val/samples.jsonl#8"' --set "gradient_accumulation_steps=${ACCUMULATION:-6}"
    --set per_device_train_batch_size=16 --set packing=true --set "packing_tokens=${PACKING:-1024}"
    --set gradient_checkpointing=false --set dataloader_num_workers=4 --set ddp_timeout=300
    --set learning_rate=1e-4)
port=29700

run() { # NAME, then a function that starts its processes
    local name=$1
    shift
    rm -rf "${out:?}/$name"
    echo "== $name"
    "$@" "$name"
}

threads() {
    "$program" "${common[@]}" --device cuda:0,cuda:1 --output-dir "$out/$1" >"$out/$1.log" 2>&1
}

one() {
    "$program" "${common[@]}" --device cuda:0 --output-dir "$out/$1" >"$out/$1.log" 2>&1
}

# As torchrun: both processes see both cards and take the one of their LOCAL_RANK.
processes() {
    port=$((port + 2))
    local rank pids=()
    for rank in 0 1; do
        env RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
            XRAY_CLUSTER_KEY=secret "$program" "${common[@]}" --set 'device=[]' --output-dir "$out/$1" \
            >"$out/$1.$rank.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
}

# As two machines: each sees one card, and NCCL is left nothing but sockets.
nodes() {
    port=$((port + 2))
    local rank pids=()
    for rank in 0 1; do
        env CUDA_VISIBLE_DEVICES=$rank NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_IB_DISABLE=1 NCCL_DEBUG=INFO \
            XRAY_CLUSTER_KEY=secret "$program" "${common[@]}" --device cuda:0 --output-dir "$out/$1" \
            --nnodes 2 --node-rank $rank --master 127.0.0.1:$port >"$out/$1.$rank.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
}

# A node that is killed: the other ends with its name.
killed() {
    port=$((port + 2))
    local rank pids=()
    for rank in 0 1; do
        env CUDA_VISIBLE_DEVICES=$rank NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 XRAY_CLUSTER_KEY=secret \
            "$program" "${common[@]}" --set max_steps=1000 --set ddp_timeout=30 --device cuda:0 --output-dir "$out/$1" \
            --nnodes 2 --node-rank $rank --master 127.0.0.1:$port >"$out/$1.$rank.log" 2>&1 &
        pids+=($!)
    done
    until grep -q "^step 5/" "$out/$1.0.log"; do
        kill -0 "${pids[0]}" || { cat "$out/$1.0.log"; return 1; }
        sleep 0.2
    done
    kill -9 "${pids[1]}"
    local before=$SECONDS code=0
    wait "${pids[0]}" || code=$?
    [ "$code" -ne 0 ] && grep -q "node 1 (" "$out/$1.0.log"
    echo "node 1 killed: the other ended $((SECONDS - before)) s later: $(grep '^error' "$out/$1.0.log" | cut -c1-200)"
}

run one one
run threads threads
run processes processes
run nodes nodes
run killed killed

python3 - "$out" <<'PY'
import hashlib, json, statistics, sys
from pathlib import Path

out = Path(sys.argv[1])

def read(name):
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    last = max((out / name).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {
        "values": [(row["step"], row["loss"], row["grad_norm"]) for row in steps],
        "adapter": hashlib.sha256((last / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "optimizer": hashlib.sha256((last / "optimizer.safetensors").read_bytes()).hexdigest(),
        # The first steps compile and tune.
        "rate": statistics.median(row["samples_per_second"] for row in steps[5:]),
    }

runs = {name: read(name) for name in ("one", "threads", "processes", "nodes")}
for name, run in runs.items():
    print(f"{name:10} {run['rate']:8.2f} samples/s  {run['rate'] / runs['one']['rate']:.3f} of one card  "
          f"loss {run['values'][0][1]:.4f} .. {run['values'][-1][1]:.4f}  adapter {run['adapter'][:12]}")
bad = 0
for name in ("processes", "nodes"):
    for key in ("values", "adapter", "optimizer"):
        if runs[name][key] != runs["threads"][key]:
            bad = 1
            print(f"{name}: {key} differ from those of one process with two threads")
            if key == "values":
                for a, b in zip(runs[name][key], runs["threads"][key]):
                    if a != b:
                        print("  first:", a, b)
                        break
if not bad:
    print("two processes and two nodes have the bits of one process with two threads")
step = 32 / runs["threads"]["rate"]
print(f"beside it: {sys.argv[0]} bench scale --step-seconds {16 / runs['one']['rate']:.4f} --nodes 1,2 --gbit 10,25,100")
sys.exit(bad)
PY
"$program" bench scale --nodes 1,2 --gbit 10,25,100,400 --step-seconds "$(python3 - "$out" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(f"{sys.argv[1]}/one/metrics.jsonl")]
print(16 / statistics.median(row["samples_per_second"] for row in rows[5:] if "loss" in row))
PY
)"
