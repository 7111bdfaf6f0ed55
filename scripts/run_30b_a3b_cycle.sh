#!/usr/bin/env bash
# Two cycles of Search-E1 with Qwen3-30B-A3B on four nodes of eight GPUs;
# arguments are those of launch.sh, among them settings (key=value).
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" --nodes 4 configs/qwen3-30b-a3b.yaml "$@"
