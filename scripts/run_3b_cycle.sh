#!/usr/bin/env bash
# Two cycles of Search-E1 with Qwen2.5-3B-Instruct on one node of eight GPUs;
# arguments are those of launch.sh, among them settings (key=value).
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" --nodes 1 configs/qwen2.5-3b.yaml "$@"
