#!/usr/bin/env bash
# Two cycles of Search-E1 with Qwen2.5-3B-Instruct on one node of eight GPUs; arguments are settings (key=value).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/env.sh
source scripts/env.sh
exec torchrun --standalone --nproc-per-node "${GPUS:-8}" -m searche1 cycle --config configs/qwen2.5-3b.yaml "$@"
