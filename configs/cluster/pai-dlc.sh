#!/usr/bin/env bash
# 阿里云 PAI-DLC 的启动命令（任务类型选 PyTorch，节点数和每节点卡数在控制台里填）。
# Start command of a PAI-DLC job of the kind PyTorch. DLC sets MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE, and WORLD_SIZE
# and RANK, which there count nodes: they are read as they are, nothing is to be mapped.
#
# 数据集、模型和输出目录挂载到 /mnt/data（NAS 或 CPFS），所有节点可见。
set -euo pipefail
: "${PROGRAM:=xray-qwen3vl}" "${CONFIG:=configs/openi-lora.toml}" "${OUTPUT_DIR:=/mnt/data/run}"

# 其他节点的密钥相同；控制台的环境变量 XRAY_CLUSTER_KEY 优先。
if [ -z "${XRAY_CLUSTER_KEY:-}" ]; then
    echo "set XRAY_CLUSTER_KEY in the job's environment (openssl rand -hex 32), the same for all nodes" >&2
fi
# 主节点的名称是服务名，监听本机所有地址。The first node's name is that of a service.
export XRAY_CLUSTER_BIND="${XRAY_CLUSTER_BIND:-0.0.0.0}"

exec "$PROGRAM" train --config "$CONFIG" --output-dir "$OUTPUT_DIR" --no-tui --resume auto "$@"
